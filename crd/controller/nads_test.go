package controller

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

func wantedNADs(t *testing.T, l v1beta1.LAN) []nadv1.NetworkAttachmentDefinition {
	t.Helper()
	want, err := wantNADs(&l)
	if err != nil {
		t.Fatal(err)
	}
	return want
}

func TestHeldSpokeHasTwoNADs(t *testing.T) {
	l := with(lan("lab", 0, 222, "srl", "refused"), ns("knlvrf"), holding("srl"))
	want := wantedNADs(t, l)
	configs := map[string]string{
		"k8slan-veth-srl": `{"cniVersion":"1.0.0","name":"k8slan-veth-srl","type":"k8slan","kind":"veth",` +
			`"lan":"default/lab","ns":"knlvrf","spoke":"srl","capabilities":{"mac":true}}`,
		"k8slan-mac-srl": `{"cniVersion":"1.0.0","name":"k8slan-mac-srl","type":"k8slan","kind":"macvtap",` +
			`"lan":"default/lab","ns":"knlvrf","spoke":"srl","capabilities":{"mac":true}}`,
	}
	if len(want) != len(configs) {
		t.Fatalf("have %d NADs, want %d", len(want), len(configs))
	}
	for _, nad := range want {
		if nad.Namespace != "default" || nad.Spec.Config != configs[nad.Name] {
			t.Errorf("%s/%s: have %s", nad.Namespace, nad.Name, nad.Spec.Config)
		}
		if r := nad.Annotations["k8s.v1.cni.cncf.io/resourceName"]; r != "macvtap.k8slan.io/k8slan-veth-srl" {
			t.Errorf("%s: resource %q", nad.Name, r)
		}
		if !metav1.IsControlledBy(&nad, &l) {
			t.Errorf("%s does not belong to the LAN", nad.Name)
		}
	}
}

func TestIPAMGoesToPodsAndNotToVMs(t *testing.T) {
	l := with(lan("lab", 0, 222, "srl"), holding("srl"))
	if err := json.Unmarshal([]byte(`{"type": "host-local", "ranges": [[{"subnet": "10.1.0.0/24"}]]}`),
		&l.Spec.IPAM); err != nil {
		t.Fatal(err)
	}
	for _, nad := range wantedNADs(t, l) {
		var conf netConf
		if err := json.Unmarshal([]byte(nad.Spec.Config), &conf); err != nil {
			t.Fatal(err)
		}
		want := ""
		if conf.Kind == "veth" {
			want = `{"type":"host-local","ranges":[[{"subnet":"10.1.0.0/24"}]]}`
		}
		if string(conf.IPAM) != want {
			t.Errorf("%s: have ipam %s, want %s", nad.Name, conf.IPAM, want)
		}
	}
}

func TestOwnNADsAreRepairedAndForeignNADsAreKept(t *testing.T) {
	l := with(lan("lab", 0, 222, "srl"), holding("srl"))
	right := wantedNADs(t, l)
	edit := func(change func(*nadv1.NetworkAttachmentDefinition)) []nadv1.NetworkAttachmentDefinition {
		edited := []nadv1.NetworkAttachmentDefinition{*right[0].DeepCopy(), *right[1].DeepCopy()}
		change(&edited[0])
		return edited
	}
	other := lan("other", 0, 1, "x")
	for _, test := range []struct {
		name                   string
		have                   []nadv1.NetworkAttachmentDefinition
		create, update, remove []string
	}{
		{name: "all exist", have: right},
		{name: "none exist", create: []string{"k8slan-veth-srl", "k8slan-mac-srl"}},
		{name: "one deleted", have: right[1:], create: []string{"k8slan-veth-srl"}},
		{
			name: "config edited", update: []string{"k8slan-veth-srl"},
			have: edit(func(n *nadv1.NetworkAttachmentDefinition) { n.Spec.Config = "{}" }),
		},
		{
			name: "resource edited", update: []string{"k8slan-veth-srl"},
			have: edit(func(n *nadv1.NetworkAttachmentDefinition) {
				n.Annotations[annotationResource] = "macvtap.k8slan.io/other"
			}),
		},
		{
			name: "label removed", update: []string{"k8slan-veth-srl"},
			have: edit(func(n *nadv1.NetworkAttachmentDefinition) { n.Labels = nil }),
		},
		{
			name: "annotation added by a user",
			have: edit(func(n *nadv1.NetworkAttachmentDefinition) { n.Annotations["team"] = "blue" }),
		},
		{
			name: "owner removed, labels left", update: []string{"k8slan-veth-srl"},
			have: edit(func(n *nadv1.NetworkAttachmentDefinition) {
				n.OwnerReferences = nil
			}),
		},
		{
			name: "left over by a deleted LAN of that name", update: []string{"k8slan-veth-srl"},
			have: edit(func(n *nadv1.NetworkAttachmentDefinition) {
				n.OwnerReferences[0].UID = "old"
			}),
		},
		{name: "foreign", have: edit(func(n *nadv1.NetworkAttachmentDefinition) {
			n.OwnerReferences, n.Labels, n.Spec.Config = nil, nil, "theirs"
		})},
		{name: "another LAN's", have: edit(func(n *nadv1.NetworkAttachmentDefinition) {
			n.OwnerReferences, n.Spec.Config = []metav1.OwnerReference{ownerReference(&other)}, "theirs"
		})},
		{
			name: "of a spoke that was removed", remove: []string{"k8slan-veth-gone"},
			have: append(edit(func(*nadv1.NetworkAttachmentDefinition) {}),
				nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{
					Namespace: "default", Name: "k8slan-veth-gone",
					OwnerReferences: []metav1.OwnerReference{ownerReference(&l)},
				}}),
		},
		{name: "the user's own beside ours", have: append(edit(func(*nadv1.NetworkAttachmentDefinition) {}),
			nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{
				Namespace: "default",
				Name:      "k8slan-veth-mine",
			}})},
	} {
		t.Run(test.name, func(t *testing.T) {
			have := diffNADs(&l, right, test.have)
			for verb, pair := range map[string][2][]string{
				"create": {names(have.create), test.create}, "update": {names(have.update), test.update},
				"remove": {names(have.remove), test.remove},
			} {
				if !slices.Equal(pair[0], pair[1]) {
					t.Errorf("%s: have %v, want %v", verb, pair[0], pair[1])
				}
			}
			for _, nad := range have.update {
				if again := diffNADs(&l, right[:1], []nadv1.NetworkAttachmentDefinition{nad}); len(again.update) > 0 {
					t.Errorf("%s still differs after the repair", nad.Name)
				}
			}
		})
	}
}

func names(nads []nadv1.NetworkAttachmentDefinition) []string {
	var list []string
	for _, nad := range nads {
		list = append(list, nad.Name)
	}
	return list
}

func TestHeldPoolHasTwoNADs(t *testing.T) {
	l := with(lan("lab", 0, 222, "srl"), withPools("web", "refused"), holding("srl", "web"))
	configs := map[string]string{}
	for _, nad := range wantedNADs(t, l) {
		configs[nad.Name] = nad.Spec.Config
		if r := nad.Annotations["k8s.v1.cni.cncf.io/resourceName"]; !strings.HasSuffix(nad.Name, "-srl") &&
			r != "macvtap.k8slan.io/k8slan-veth-web" {
			t.Errorf("%s: resource %q", nad.Name, r)
		}
	}
	want := `{"cniVersion":"1.0.0","name":"k8slan-veth-web","type":"k8slan","kind":"veth",` +
		`"lan":"default/lab","ns":"default.lab","pool":"web","capabilities":{"mac":true}}`
	if len(configs) != 4 || configs["k8slan-veth-web"] != want ||
		!strings.Contains(configs["k8slan-mac-web"], `"kind":"macvtap"`) {
		t.Errorf("have %v", configs)
	}
}
