package api

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/yaml"

	"github.com/k8slan/k8slan/crd/controller"
	"github.com/k8slan/k8slan/crd/v1beta1"
)

// startController runs the controller with its rights in the chart until stop is called or the test ends.
func startController(t *testing.T) (stop func()) {
	t.Helper()
	cfg := rest.CopyConfig(kube.Client)
	cfg.Impersonate = rest.ImpersonationConfig{UserName: controllerAccount}
	mgr, err := ctrl.NewManager(cfg, ctrl.Options{
		Scheme:  controller.NewScheme(),
		Logger:  logr.Discard(),
		Metrics: metricsserver.Options{BindAddress: "0"},
		// several run one after the other in this program
		Controller: config.Controller{SkipNameValidation: ptr.To(true)},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := controller.Setup(mgr, v1beta1.Multicast, controller.NewMetrics()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- mgr.Start(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the controller ended with: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// create creates an object and removes it after the test.
func create[T client.Object](t *testing.T, object T) T {
	t.Helper()
	if err := api.Create(t.Context(), object); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { remove(t, object) })
	return object
}

// createLAN creates a LAN in namespace default and removes it after the test.
func createLAN(t *testing.T, name, spec string) *v1beta1.LAN {
	t.Helper()
	var lan v1beta1.LAN
	if err := yaml.UnmarshalStrict([]byte(manifest(name, spec)), &lan); err != nil {
		t.Fatal(err)
	}
	lan.Namespace = "default"
	if err := api.Create(t.Context(), &lan); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeByForce(t, lan.DeepCopy()) })
	return &lan
}

// edit changes an object, and retries if it was written meanwhile.
func edit[T client.Object](t *testing.T, object T, change func(T)) {
	t.Helper()
	eventually(t, func() string {
		if err := api.Get(t.Context(), client.ObjectKeyFromObject(object), object); err != nil {
			return err.Error()
		}
		change(object)
		if err := api.Update(t.Context(), object); err != nil {
			return err.Error()
		}
		return ""
	})
}

func read[T client.Object](t *testing.T, object T) T {
	t.Helper()
	if err := api.Get(t.Context(), client.ObjectKeyFromObject(object), object); err != nil {
		t.Fatal(err)
	}
	return object
}

// node creates a Node that runs k8slan.
func node(t *testing.T, name string, labels map[string]string) *v1beta1.LANNode {
	t.Helper()
	create(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}})
	return create(t, &v1beta1.LANNode{ObjectMeta: metav1.ObjectMeta{Name: name}})
}

// report writes the segments of a node into its LANNode, as its daemon does.
func report(t *testing.T, node *v1beta1.LANNode, segments ...v1beta1.SegmentStatus) {
	t.Helper()
	node.Status.Segments, node.Status.Gone = segments, nil
	if err := api.Status().Update(t.Context(), node); err != nil {
		t.Fatal(err)
	}
}

// reportGone writes that a node has removed LANs that are being deleted, as its daemon does.
func reportGone(t *testing.T, node *v1beta1.LANNode, lans ...*v1beta1.LAN) {
	t.Helper()
	node.Status.Segments, node.Status.Gone = nil, nil
	for _, l := range lans {
		node.Status.Gone = append(node.Status.Gone, v1beta1.GoneLAN{
			LAN: "default/" + l.Name, UID: l.UID,
			Generation: l.Generation,
		})
	}
	if err := api.Status().Update(t.Context(), node); err != nil {
		t.Fatal(err)
	}
}

// leaving returns a segment of a LAN that is leaving the node.
func leaving(lan *v1beta1.LAN, attachments ...v1beta1.Attachment) v1beta1.SegmentStatus {
	s := offered(lan, attachments...)
	s.State, s.Offered = v1beta1.SegmentLeaving, 0
	return s
}

// offered returns a segment of the LAN that offers all its spokes.
func offered(lan *v1beta1.LAN, attachments ...v1beta1.Attachment) v1beta1.SegmentStatus {
	return v1beta1.SegmentStatus{
		LAN: lan.Namespace + "/" + lan.Name, UID: lan.UID, Generation: lan.Generation, NS: lan.Effective().NS,
		VNI: lan.Spec.VNI, Port: lan.Effective().VXLANPort,
		State: v1beta1.SegmentReady, Offered: int32(len(lan.Spec.Spokes)), Attachments: attachments,
	}
}

func pod(spoke, name string) v1beta1.Attachment {
	return v1beta1.Attachment{
		Spoke: spoke, Pod: "default/" + name, Interface: "net1", MAC: "02:6b:5c:10:00:01", Kind: v1beta1.KindVeth,
		Since: metav1.Unix(1767323045, 0),
	}
}

// summary returns a LAN's status in one line.
func summary(lan *v1beta1.LAN) string {
	spokes := "none"
	if h := lan.Status.Holds; h != nil {
		spokes = strings.Join(h.Spokes, ",")
	}
	return fmt.Sprintf("%s|%s|%s|%s", lan.Status.State, lan.Status.Reason, spokes, lan.Status.Nodes)
}

func awaitSummary(t *testing.T, lan *v1beta1.LAN, want string) {
	t.Helper()
	eventually(t, func() string {
		if have := summary(read(t, lan)); have != want {
			return fmt.Sprintf("LAN %s:\nhave %s\nwant %s", lan.Name, have, want)
		}
		return ""
	})
}

// awaitCondition waits until a condition is like "False UnderlayMissing: …".
func awaitCondition(t *testing.T, lan *v1beta1.LAN, kind, want string) {
	t.Helper()
	eventually(t, func() string {
		have := "absent"
		if c := meta.FindStatusCondition(read(t, lan).Status.Conditions, kind); c != nil {
			have = fmt.Sprintf("%s %s: %s", c.Status, c.Reason, c.Message)
		}
		if have != want {
			return fmt.Sprintf("condition %s of LAN %s:\nhave %s\nwant %s", kind, lan.Name, have, want)
		}
		return ""
	})
}

// awaitEvent waits for an event on the LAN like "Warning Conflict: …".
func awaitEvent(t *testing.T, lan *v1beta1.LAN, want string) {
	t.Helper()
	eventually(t, func() string {
		var list eventsv1.EventList
		if err := api.List(t.Context(), &list, client.InNamespace(lan.Namespace)); err != nil {
			return err.Error()
		}
		var have []string
		for _, e := range list.Items {
			if e.Regarding.UID == lan.UID {
				have = append(have, fmt.Sprintf("%s %s: %s", e.Type, e.Reason, e.Note))
			}
		}
		if !slices.Contains(have, want) {
			return fmt.Sprintf("no event %q on LAN %s, but %q", want, lan.Name, have)
		}
		return ""
	})
}

// nadsOf returns the LAN's NADs by name.
func nadsOf(t *testing.T, lan *v1beta1.LAN) map[string]nadv1.NetworkAttachmentDefinition {
	t.Helper()
	var list nadv1.NetworkAttachmentDefinitionList
	if err := api.List(t.Context(), &list, client.InNamespace(lan.Namespace)); err != nil {
		t.Fatal(err)
	}
	nads := map[string]nadv1.NetworkAttachmentDefinition{}
	for _, nad := range list.Items {
		if metav1.IsControlledBy(&nad, lan) {
			nads[nad.Name] = nad
		}
	}
	return nads
}

func awaitNADs(t *testing.T, lan *v1beta1.LAN, want ...string) {
	t.Helper()
	slices.Sort(want)
	eventually(t, func() string {
		if have := slices.Sorted(maps.Keys(nadsOf(t, lan))); !slices.Equal(have, want) {
			return fmt.Sprintf("NADs of LAN %s:\nhave %v\nwant %v", lan.Name, have, want)
		}
		return ""
	})
}

func TestDefaultsAreNotWrittenIntoSpec(t *testing.T) {
	startController(t)
	lan := createLAN(t, "plain", "{vni: 901, spokes: [plain]}")
	awaitSummary(t, lan, "Pending|NoNodes|plain|0/0")
	object := parse(t, manifest("plain", "{}"))
	if err := api.Get(t.Context(), client.ObjectKeyFromObject(object), object); err != nil {
		t.Fatal(err)
	}
	spec, err := yaml.Marshal(object.Object["spec"])
	if err != nil {
		t.Fatal(err)
	}
	if want := "spokes:\n- plain\nvni: 901\n"; string(spec) != want {
		t.Errorf("have spec\n%swant\n%s", spec, want)
	}
	if h := lan.Status.Holds; h.NS != "default.plain" || h.VNI != 901 || h.Port != 4789 {
		t.Errorf("holds %+v", h)
	}
}

func TestNADsAreWrittenRepairedAndRemoved(t *testing.T) {
	startController(t)
	lan := createLAN(t, "nads", "{vni: 902, ns: nadns, spokes: [n1, n2]}")
	awaitNADs(t, lan, "k8slan-veth-n1", "k8slan-mac-n1", "k8slan-veth-n2", "k8slan-mac-n2")

	written := nadsOf(t, lan)["k8slan-veth-n1"]
	config := `{"cniVersion":"1.0.0","name":"k8slan-veth-n1","type":"k8slan","kind":"veth","lan":"default/nads",` +
		`"ns":"nadns","spoke":"n1","capabilities":{"mac":true}}`
	if written.Spec.Config != config {
		t.Errorf("\nhave %s\nwant %s", written.Spec.Config, config)
	}
	for _, nad := range nadsOf(t, lan) {
		spoke := nad.Name[strings.LastIndex(nad.Name, "-")+1:]
		have, want := nad.Annotations["k8s.v1.cni.cncf.io/resourceName"], "macvtap.k8slan.io/k8slan-veth-"+spoke
		if have != want {
			t.Errorf("%s names resource %q, want %q", nad.Name, have, want)
		}
	}

	t.Run("edited by hand", func(t *testing.T) {
		edit(t, written.DeepCopy(), func(nad *nadv1.NetworkAttachmentDefinition) {
			nad.Spec.Config, nad.Annotations["k8s.v1.cni.cncf.io/resourceName"], nad.Annotations["team"] = "{}",
				"other/one", "blue"
		})
		eventually(t, func() string {
			nad := nadsOf(t, lan)["k8slan-veth-n1"]
			if nad.Spec.Config != config ||
				nad.Annotations["k8s.v1.cni.cncf.io/resourceName"] != "macvtap.k8slan.io/k8slan-veth-n1" {
				return fmt.Sprintf("not repaired: %s %v", nad.Spec.Config, nad.Annotations)
			}
			if nad.Annotations["team"] != "blue" {
				return "the annotation of a user is lost"
			}
			return ""
		})
	})
	t.Run("deleted by hand", func(t *testing.T) {
		gone := nadsOf(t, lan)["k8slan-mac-n2"]
		if err := api.Delete(t.Context(), &gone); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() string {
			if nad, ok := nadsOf(t, lan)["k8slan-mac-n2"]; !ok || nad.UID == gone.UID {
				return "the NAD was not created again"
			}
			return ""
		})
	})
	t.Run("a spoke is replaced", func(t *testing.T) {
		stays := nadsOf(t, lan)["k8slan-veth-n2"].ResourceVersion
		edit(t, lan, func(l *v1beta1.LAN) { l.Spec.Spokes = []string{"n2", "n3"} })
		awaitNADs(t, lan, "k8slan-veth-n2", "k8slan-mac-n2", "k8slan-veth-n3", "k8slan-mac-n3")
		if now := nadsOf(t, lan)["k8slan-veth-n2"].ResourceVersion; now != stays {
			t.Error("the NAD of the spoke that stays was written")
		}
	})
	t.Run("IPAM is added", func(t *testing.T) {
		edit(t, lan, func(l *v1beta1.LAN) {
			if err := yaml.Unmarshal([]byte("{type: static, addresses: [{address: 10.1.0.1/24}]}"),
				&l.Spec.IPAM); err != nil {
				t.Fatal(err)
			}
		})
		eventually(t, func() string {
			veth, macvtap := nadsOf(t, lan)["k8slan-veth-n2"].Spec.Config, nadsOf(t, lan)["k8slan-mac-n2"].Spec.Config
			if !strings.HasSuffix(veth, `"ipam":{"addresses":[{"address":"10.1.0.1/24"}],"type":"static"}}`) ||
				strings.Contains(macvtap, "ipam") {
				return "have " + veth + " and " + macvtap
			}
			return ""
		})
	})
	t.Run("a NAD of a user has its name", func(t *testing.T) {
		foreign := &nadv1.NetworkAttachmentDefinition{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "k8slan-veth-n4"},
			Spec:       nadv1.NetworkAttachmentDefinitionSpec{Config: `{"type":"bridge"}`},
		}
		if err := api.Create(t.Context(), foreign); err != nil {
			t.Fatal(err)
		}
		node(t, "nads-1", nil)
		edit(t, lan, func(l *v1beta1.LAN) { l.Spec.Spokes = []string{"n4"} })
		sentence := "node nads-1 does not report the LAN yet; " +
			"NetworkAttachmentDefinition default/k8slan-veth-n4 does not belong to this LAN; " +
			"delete it, and k8slan creates its own; spokes are offered on 0 of 1 nodes"
		awaitCondition(t, lan, "Ready", "False NADConflict: "+sentence)
		awaitEvent(t, lan, "Warning NADConflict: "+sentence)
		awaitNADs(t, lan, "k8slan-mac-n4")
		if config := read(t, foreign).Spec.Config; config != `{"type":"bridge"}` {
			t.Errorf("the user's NAD was overwritten with %s", config)
		}
		if err := api.Delete(t.Context(), foreign); err != nil {
			t.Fatal(err)
		}
		awaitNADs(t, lan, "k8slan-veth-n4", "k8slan-mac-n4")
		awaitCondition(t, lan, "Ready",
			"False Pending: node nads-1 does not report the LAN yet; spokes are offered on 0 of 1 nodes")
	})
	t.Run("the LAN is deleted", func(t *testing.T) {
		removeByForce(t, lan.DeepCopy())
		awaitNADs(t, lan)
	})
}

func TestConflictsAreExplainedAndResolved(t *testing.T) {
	startController(t)
	lab := createLAN(t, "clash-lab", "{vni: 903, spokes: [c1]}")
	awaitSummary(t, lab, "Pending|NoNodes|c1|0/0")
	vni := createLAN(t, "clash-vni", "{vni: 903, spokes: [c2]}")
	awaitSummary(t, vni, "Conflict|vni 903 is held by default/clash-lab|none|0/0")
	ns := createLAN(t, "clash-ns", "{vni: 904, ns: default.clash-lab, spokes: [c3]}")
	awaitSummary(t, ns, "Conflict|ns default.clash-lab is held by default/clash-lab|none|0/0")
	reserved := "ns default.clash-lab is held by default/clash-lab; ns cannot be changed: delete this LAN and create " +
		"it with another ns, or without one"
	awaitCondition(t, ns, "Accepted", "False Conflict: "+reserved)
	awaitEvent(t, ns, "Warning Conflict: "+reserved)
	spoke := createLAN(t, "clash-spoke", "{vni: 905, spokes: [c1, c4]}")
	awaitSummary(t, spoke, "Degraded|SpokeConflict|c4|0/0")

	sentence := "vni 903 is held by default/clash-lab; vni cannot be changed: choose another vxlanPort, or delete " +
		"this LAN and create it with another vni"
	awaitCondition(t, vni, "Accepted", "False Conflict: "+sentence)
	awaitEvent(t, vni, "Warning Conflict: "+sentence)
	awaitCondition(t, spoke, "Accepted",
		"False SpokeConflict: spoke c1 is held by default/clash-lab; the other spokes are held")
	awaitEvent(t, spoke, "Warning SpokeConflict: spoke c1 is held by default/clash-lab; the other spokes are held")
	if list := spoke.Status.Spokes; len(list) != 1 || list[0].Name != "c1" ||
		list[0].Refused != "spoke c1 is held by default/clash-lab" {
		t.Errorf("refused spokes: %+v", list)
	}
	awaitNADs(t, vni)
	awaitNADs(t, spoke, "k8slan-veth-c4", "k8slan-mac-c4")
	awaitNADs(t, lab, "k8slan-veth-c1", "k8slan-mac-c1")

	// The VNI is free on another port.
	edit(t, vni, func(l *v1beta1.LAN) { l.Spec.VXLANPort = 4790 })
	awaitSummary(t, vni, "Pending|NoNodes|c2|0/0")
	edit(t, vni, func(l *v1beta1.LAN) { l.Spec.VXLANPort = 0 })
	awaitSummary(t, vni, "Conflict|vni 903 is held by default/clash-lab|none|0/0")
	awaitNADs(t, vni)

	// The holder gives up its spoke, and is then deleted.
	edit(t, lab, func(l *v1beta1.LAN) { l.Spec.Spokes = []string{"c5"} })
	awaitSummary(t, spoke, "Pending|NoNodes|c1,c4|0/0")
	awaitEvent(t, spoke, "Normal Held: holds ns default.clash-spoke, vni 905 and its spokes")
	awaitNADs(t, spoke, "k8slan-veth-c1", "k8slan-mac-c1", "k8slan-veth-c4", "k8slan-mac-c4")
	remove(t, lab)
	awaitSummary(t, vni, "Pending|NoNodes|c2|0/0")
	awaitSummary(t, ns, "Pending|NoNodes|c3|0/0")
	awaitNADs(t, vni, "k8slan-veth-c2", "k8slan-mac-c2")
	awaitEvent(t, vni, "Normal Held: holds ns default.clash-vni, vni 903 and its spokes")
}

func TestLANKeepsWhatItHoldsWhileControllerIsAway(t *testing.T) {
	stop := startController(t)
	old := createLAN(t, "away-old", "{vni: 906, spokes: [w1]}")
	awaitSummary(t, old, "Pending|NoNodes|w1|0/0")
	young := createLAN(t, "away-young", "{vni: 906, vxlanPort: 4790, spokes: [w2]}")
	awaitSummary(t, young, "Pending|NoNodes|w2|0/0")
	stop()
	edit(t, old, func(l *v1beta1.LAN) { l.Spec.VXLANPort, l.Spec.Spokes = 4790, []string{"w1", "w2"} })
	startController(t)
	awaitSummary(t, old, "Conflict|vni 906 on port 4790 is held by default/away-young|none|0/0")
	awaitSummary(t, young, "Pending|NoNodes|w2|0/0")
}

func TestRecreatedLANWaitsForPodsOfItsPredecessor(t *testing.T) {
	startController(t)
	worker := node(t, "predecessor-1", nil)
	lan := createLAN(t, "again", "{vni: 907, spokes: [g1]}")
	awaitSummary(t, lan, "Pending|Pending|g1|0/1")
	report(t, worker, offered(lan, pod("g1", "srl-1")))
	awaitSummary(t, lan, "Ready||g1|1/1")
	removeByForce(t, lan.DeepCopy()) // as if its node had been lost, and came back now

	report(t, worker, leaving(lan, pod("g1", "srl-1")))
	again := createLAN(t, "again", "{vni: 907, spokes: [g1]}")
	sentence := "vni 907 is still in use by default/again (leaving) on node predecessor-1; this LAN gets it when " +
		"these pods are gone: " +
		"default/srl-1 on predecessor-1 (spoke g1 of LAN default/again)"
	awaitCondition(t, again, "Accepted", "False Conflict: "+sentence)
	awaitEvent(t, again, "Warning Conflict: "+sentence)
	report(t, worker)
	awaitSummary(t, again, "Pending|Pending|g1|0/1")
	awaitEvent(t, again, "Normal Held: holds ns default.again, vni 907 and its spokes")
}

func TestStatusSumsUpNodes(t *testing.T) {
	startController(t)
	worker1, worker2 := node(t, "sum-1", map[string]string{"lab": "yes"}),
		node(t, "sum-2", map[string]string{"lab": "yes"})
	node(t, "sum-3", nil)
	lan := createLAN(t, "sum", "{vni: 908, spokes: [srl, vm], nodeSelector: {lab: 'yes'}}")
	awaitSummary(t, lan, "Pending|Pending|srl,vm|0/2")

	missing := offered(lan)
	missing.State, missing.Offered, missing.Reason = v1beta1.SegmentNotReady, 0, v1beta1.ReasonUnderlayMissing
	missing.Message = `no device "eth7" (spec.vxlanDevMap.sum-2)`
	report(t, worker1, offered(lan, pod("srl", "srl-1")))
	report(t, worker2, missing)
	awaitSummary(t, lan, "Degraded|UnderlayMissing|srl,vm|1/2")
	sentence := `node sum-2: no device "eth7" (spec.vxlanDevMap.sum-2); spokes are offered on 1 of 2 nodes`
	awaitCondition(t, lan, "Ready", "False UnderlayMissing: "+sentence)
	awaitEvent(t, lan, "Warning UnderlayMissing: "+sentence)

	t.Run("kubectl shows it", func(t *testing.T) {
		for _, kind := range []string{"lan", "lans"} {
			out, err := kube.kubectl(t.Context(), "", "get", kind, "sum")
			if err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(strings.TrimSpace(out), "\n")
			header, row := strings.Fields(lines[0]), strings.Fields(lines[1])
			want := []string{"sum", "908", "multicast", "2", "1", "1/2", "Degraded", "UnderlayMissing"}
			if strings.Join(header, " ") != "NAME VNI DISCOVERY SPOKES ATTACHED NODES STATE REASON AGE" ||
				!slices.Equal(row[:len(want)], want) {
				t.Errorf("kubectl get %s:\n%s", kind, out)
			}
		}
		out, err := kube.kubectl(t.Context(), "", "get", "k8slan", "-A")
		if err != nil || !strings.Contains(out, "lan.lan.k8slan.io/sum") ||
			!strings.Contains(out, "lannode.lan.k8slan.io/sum-1") {
			t.Errorf("kubectl get k8slan -A: %v\n%s", err, out)
		}
	})

	report(t, worker2, offered(lan))
	if _, err := kube.kubectl(t.Context(), "", "wait", "--for=condition=Ready", "lan/sum",
		"--timeout=30s"); err != nil {
		t.Fatal(err)
	}
	awaitSummary(t, lan, "Ready||srl,vm|2/2")
	awaitEvent(t, lan, "Normal Offered: spokes are offered on 2 of 2 nodes")
	want := v1beta1.SpokeAttachment{Node: "sum-1", Attachment: pod("srl", "srl-1")}
	if s := lan.Status.Spokes; len(s) != 1 || len(s[0].Attachments) != 1 || s[0].Name != "srl" ||
		s[0].Attachments[0].Node != want.Node || s[0].Attachments[0].Pod != want.Pod ||
		!s[0].Attachments[0].Since.Equal(&want.Since) {
		t.Errorf("spokes: %+v", lan.Status.Spokes)
	}

	report(t, worker2, offered(lan, pod("srl", "srl-2")))
	twice := "spoke srl is attached twice: default/srl-1 on sum-1, default/srl-2 on sum-2; " +
		"this is right only during a live migration, because both have the same MAC unless another was requested"
	awaitEvent(t, lan, "Warning TwoNodes: "+twice)
	awaitCondition(t, lan, "AttachedTwice", "True TwoNodes: "+twice)
	report(t, worker1, offered(lan))
	awaitCondition(t, lan, "AttachedTwice", "absent")
	awaitEvent(t, lan, "Normal OneNode: no spoke is attached twice any more")

	remove(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "sum-2"}})
	awaitSummary(t, lan, "Ready||srl,vm|1/1")
}

// reconciled returns the number of finished runs of a reconciler.
func reconciled(t *testing.T, name string) float64 {
	t.Helper()
	families, err := metrics.Registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	total := 0.0
	for _, family := range families {
		if family.GetName() != "controller_runtime_reconcile_total" {
			continue
		}
		for _, m := range family.GetMetric() {
			for _, label := range m.GetLabel() {
				if label.GetName() == "controller" && label.GetValue() == name {
					total += m.GetCounter().GetValue()
				}
			}
		}
	}
	return total
}

func TestNothingIsWrittenWhereNothingChanged(t *testing.T) {
	startController(t)
	worker := node(t, "calm-1", nil)
	lan := createLAN(t, "calm", "{vni: 909, spokes: [q1]}")
	awaitSummary(t, lan, "Pending|Pending|q1|0/1")
	refused := createLAN(t, "calm-refused", "{vni: 909, spokes: [q2]}")
	awaitSummary(t, refused, "Conflict|vni 909 is held by default/calm|none|0/1")
	report(t, worker, offered(lan, pod("q1", "a")))
	awaitSummary(t, lan, "Ready||q1|1/1")
	awaitNADs(t, lan, "k8slan-veth-q1", "k8slan-mac-q1")

	versions := func() string {
		words := []string{read(t, lan).ResourceVersion, read(t, refused).ResourceVersion}
		nads := nadsOf(t, lan)
		for _, name := range slices.Sorted(maps.Keys(nads)) {
			words = append(words, nads[name].ResourceVersion)
		}
		return strings.Join(words, " ")
	}
	before := versions()
	for i := range 3 {
		claims, nads := reconciled(t, "claims"), reconciled(t, "nads")
		edit(t, worker, func(n *v1beta1.LANNode) {
			metav1.SetMetaDataAnnotation(&n.ObjectMeta, "round",
				fmt.Sprint(i))
		})
		nad := nadsOf(t, lan)["k8slan-mac-q1"]
		edit(t, &nad, func(n *nadv1.NetworkAttachmentDefinition) {
			metav1.SetMetaDataAnnotation(&n.ObjectMeta, "round", fmt.Sprint(i))
		})
		written := versions()
		eventually(t, func() string {
			if reconciled(t, "claims") == claims || reconciled(t, "nads") == nads {
				return "the controller does not react to the change"
			}
			return ""
		})
		if after := versions(); after != written {
			t.Fatalf("objects were written without a change: versions before %s, after %s", written, after)
		}
	}
	if lans := strings.Fields(versions())[:2]; !slices.Equal(lans, strings.Fields(before)[:2]) {
		t.Error("LANs were written without a change")
	}
}

func TestLANWithFiveHundredSpokes(t *testing.T) {
	startController(t)
	spokes := make([]string, v1beta1.MaxSpokes)
	for i := range spokes {
		spokes[i] = fmt.Sprintf("big-%d", i)
	}
	added, err := api.Watch(t.Context(), &nadv1.NetworkAttachmentDefinitionList{}, client.InNamespace("default"))
	if err != nil {
		t.Fatal(err)
	}
	defer added.Stop()
	lan := createLAN(t, "big", "{vni: 910, spokes: ["+strings.Join(spokes, ", ")+"]}")
	late := time.After(deadline)
	for n := 0; n < 2*len(spokes); {
		select {
		case e := <-added.ResultChan():
			if nad, ok := e.Object.(*nadv1.NetworkAttachmentDefinition); ok && e.Type == "ADDED" &&
				metav1.IsControlledBy(nad, lan) {
				n++
			}
		case <-late:
			t.Fatalf("%d NADs, want %d", n, 2*len(spokes))
		}
	}
	if n := len(nadsOf(t, lan)); n != 2*len(spokes) {
		t.Errorf("%d NADs, want %d", n, 2*len(spokes))
	}
	if n := read(t, lan).Status.SpokeCount; n != v1beta1.MaxSpokes {
		t.Errorf("the status has %d spokes, want %d", n, v1beta1.MaxSpokes)
	}
}

// ledger has the LANs of namespace default as the API server's events show them, one state of the cluster after the
// other.
type ledger struct {
	mu      sync.Mutex
	lans    map[types.UID]*v1beta1.LAN
	events  int
	changed chan struct{} // closed and made again with each event
}

// follow adds events until the watch ends, and expects nothing to be held twice after any of them.
func (l *ledger) follow(t *testing.T, events <-chan watch.Event) {
	for e := range events {
		lan, ok := e.Object.(*v1beta1.LAN)
		if !ok {
			continue
		}
		l.mu.Lock()
		l.events++
		l.lans[lan.UID] = lan
		if e.Type == watch.Deleted {
			delete(l.lans, lan.UID)
		}
		if twice := heldTwice(l.lans); twice != "" {
			t.Errorf("%s after %s %s", twice, e.Type, lan.Name)
		}
		close(l.changed)
		l.changed = make(chan struct{})
		l.mu.Unlock()
	}
}

// awaitObserved waits until the controller has observed the LAN's spec, and returns the LAN.
func (l *ledger) awaitObserved(t *testing.T, lan *v1beta1.LAN) *v1beta1.LAN {
	late := time.After(deadline)
	for {
		l.mu.Lock()
		now, changed := l.lans[lan.UID], l.changed
		l.mu.Unlock()
		if now != nil && now.Generation >= lan.Generation && now.Status.ObservedGeneration == now.Generation {
			return now.DeepCopy()
		}
		select {
		case <-changed:
		case <-late:
			t.Errorf("the controller does not observe LAN %s", lan.Name)
			return lan
		}
	}
}

func TestNothingIsEverHeldTwice(t *testing.T) {
	startController(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	events, err := api.Watch(ctx, &v1beta1.LANList{}, client.InNamespace("default"))
	if err != nil {
		t.Fatal(err)
	}
	l := &ledger{lans: map[types.UID]*v1beta1.LAN{}, changed: make(chan struct{})}
	var following, crowd sync.WaitGroup
	following.Go(func() { l.follow(t, events.ResultChan()) })
	for i := range 12 {
		crowd.Go(func() { churnLAN(t, l, fmt.Sprintf("crowd-%d", i), rand.New(rand.NewPCG(7, uint64(i)))) })
	}
	crowd.Wait()
	awaitNoLANs(t)
	cancel()
	following.Wait()
	if l.events < 12 {
		t.Errorf("saw %d events", l.events)
	}
}

// churnLAN creates, edits and deletes LANs. Several run at the same time and ask for the same few VNIs and spokes.
func churnLAN(t *testing.T, l *ledger, name string, r *rand.Rand) {
	for round := range 4 {
		lan := &v1beta1.LAN{
			// the one before may not be gone yet
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("%s-%d", name, round)},
			Spec: v1beta1.LANSpec{
				VNI: int32(920 + r.IntN(4)), NS: fmt.Sprintf("crowd-%d", r.IntN(10)),
				Spokes: randomSpokes(r),
			},
		}
		if err := api.Create(t.Context(), lan); err != nil {
			t.Errorf("create %s: %v", name, err)
			return
		}
		for range 4 {
			lan = l.awaitObserved(t, lan)
			lan.Spec.VXLANPort, lan.Spec.Spokes = int32(4789+r.IntN(2)), randomSpokes(r)
			err := api.Update(t.Context(), lan)
			if err != nil && !apierrors.IsConflict(err) { // the controller writes it, too
				t.Errorf("edit %s: %v", name, err)
			}
		}
		if err := api.Delete(t.Context(), lan); err != nil {
			t.Errorf("delete %s: %v", name, err)
		}
	}
}

func randomSpokes(r *rand.Rand) []string {
	all := []string{"z1", "z2", "z3", "z4", "z5"}
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:1+r.IntN(4)]
}

// heldTwice names something that two LANs hold. It returns "" if there is nothing.
func heldTwice(lans map[types.UID]*v1beta1.LAN) string {
	holders := map[string]types.UID{}
	for uid, lan := range lans {
		h := lan.Status.Holds
		if h == nil {
			continue
		}
		things := []string{"ns " + h.NS, fmt.Sprintf("vni %d on port %d", h.VNI, h.Port)}
		for _, spoke := range h.Spokes {
			things = append(things, "spoke "+spoke)
		}
		for _, thing := range things {
			if holders[thing] != "" {
				return thing + " is held twice"
			}
			holders[thing] = uid
		}
	}
	return ""
}

// awaitNoLANs waits until no LAN is left in namespace default.
func awaitNoLANs(t *testing.T) {
	t.Helper()
	eventually(t, func() string {
		var lans v1beta1.LANList
		if err := api.List(t.Context(), &lans, client.InNamespace("default")); err != nil {
			return err.Error()
		}
		if len(lans.Items) > 0 {
			return fmt.Sprintf("%d LANs are left", len(lans.Items))
		}
		return ""
	})
}
