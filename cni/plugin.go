// Package cni attaches a pod or a VM to its spoke when the container runtime asks, and detaches it again.
//
// It needs neither the daemon nor the API server: the network configuration names the LAN and the spoke, the node's
// record of the LAN says which pods may attach, and the claim is made in the kernel.
package cni

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/k8slan/k8slan/cni/report"
	"github.com/k8slan/k8slan/lanmgr/cdi"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// Node is the node that the plugin runs on; *kernel.Node implements it.
type Node interface {
	Record(netns string) (segment.Segment, error)
	Records() ([]segment.Segment, error)
	Underlays(ctx context.Context) (kernel.Underlays, error)
	Claim(ctx context.Context, req kernel.ClaimRequest) (kernel.Attachment, error)
	Release(ctx context.Context, netns, spoke, claimID string) error
	Claims(ctx context.Context, netns string) ([]segment.Claim, error)
	CheckClaim(ctx context.Context, req kernel.ClaimRequest) error

	// SetAddresses adds addresses and routes to the pod's interface, and waits until they can be used.
	SetAddresses(ctx context.Context, podNetns, ifname string, want kernel.Addressing) error
	// Addresses returns the addresses of the pod's interface.
	Addresses(ctx context.Context, podNetns, ifname string) ([]netip.Prefix, error)
}

// Plugin answers the verbs of CNI.
type Plugin struct {
	node Node
	host Host
}

// Host is the plugin's environment: folders, variables and output.
type Host struct {
	Run    string    // k8slan's folder for what lasts until the node reboots; error messages name paths in it
	CDI    string    // folder of CDI devices, one file per attachment, which the container runtime reads
	Env    []string  // environment of IPAM plugins, in addition to the variables that CNI specifies
	Stdout io.Writer // where results are written

	Report func(report.Outcome) // receives the outcome of each ADD and DEL; nil: outcomes are not reported
}

// New returns the plugin of a node.
func New(node Node, host Host) *Plugin { return &Plugin{node: node, host: host} }

// Funcs returns the plugin's verbs as skel calls them. Each ends when ctx ends.
func (p *Plugin) Funcs(ctx context.Context) skel.CNIFuncs {
	with := func(verb func(context.Context, *skel.CmdArgs) error) func(*skel.CmdArgs) error {
		return func(args *skel.CmdArgs) error { return verb(ctx, args) }
	}
	return skel.CNIFuncs{
		Add: with(p.reported(report.Add, p.add)), Del: with(p.reported(report.Del, p.del)),
		Check: with(p.check), GC: with(p.gc), Status: with(p.status),
	}
}

// verb is a verb whose outcome is reported.
type verb func(ctx context.Context, args *skel.CmdArgs, o *report.Outcome) error

// reported returns a verb that sends its outcome to the daemon when it is done.
func (p *Plugin) reported(name report.Verb, verb verb) func(context.Context, *skel.CmdArgs) error {
	return func(ctx context.Context, args *skel.CmdArgs) error {
		o, start := report.Outcome{Verb: name}, time.Now()
		err := verb(ctx, args, &o)
		o.Took = time.Since(start)
		if err != nil && o.Reason == "" {
			o.Reason = Reason(err)
		}
		if p.host.Report != nil {
			p.host.Report(o)
		}
		return err
	}
}

// undoTimeout limits the undoing of a failed ADD. It is independent of ADD's own time limit.
const undoTimeout = 10 * time.Second

func (p *Plugin) add(ctx context.Context, args *skel.CmdArgs, o *report.Outcome) error {
	r, err := p.request(args)
	if err != nil {
		return err
	}
	o.Kind = r.kind
	if isOwnNetns(r.podNetns) {
		return fail(types.ErrInvalidNetNS,
			"%s: CNI_NETNS %s is the node's own network namespace: a pod with hostNetwork gets no interface in a LAN",
			r, r.podNetns)
	}
	var steps undo
	result, err := p.attach(ctx, r, &steps, o)
	if err == nil {
		err = p.print(result, r.version)
	}
	if err == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	return steps.run(ctx, err)
}

// isOwnNetns reports whether a path is the namespace that this process is in. It returns false for a path that cannot
// be read: the claim then fails with the cause.
func isOwnNetns(path string) bool {
	pod, podErr := os.Stat(path)
	own, ownErr := os.Stat("/proc/self/ns/net")
	return podErr == nil && ownErr == nil && os.SameFile(pod, own)
}

// admit returns an error if the node's record of the LAN or kubelet's allocation does not let the pod have the spoke.
func (r request) admit(record segment.Segment) error {
	if r.vni != 0 {
		return r.admitOnDemand(record)
	}
	switch err := r.checkLAN(record); {
	case err != nil:
		return err
	case !record.Allows(r.pod.namespace) && r.pod.namespace == "":
		return fail(types.ErrInvalidEnvironmentVariables,
			"LAN %s is not open to all namespaces, and CNI_ARGS has no K8S_POD_NAMESPACE that names the pod's", r.lan)
	case !record.Allows(r.pod.namespace):
		return fail(CodeForbidden, "LAN %s is not open to namespace %s; its owner can add %s to spec.allowedNamespaces",
			r.lan, r.pod.namespace, r.pod.namespace)
	case !r.existsIn(record):
		return r.noSpoke(CodeNoSpoke)
	case r.deviceID == "":
		return fail(CodeNoDevice, "%s: kubelet allocated no macvtap.k8slan.io/k8slan-veth-%s to this pod. "+
			"Either none of its containers has it in resources.limits: add it there; "+
			"or the pod is bound to a node that did not advertise it: see kubectl get lan -n %s %s",
			r, r.spokeOrPool(), r.lan.Namespace, r.lan.Name)
	case !r.matches(r.deviceID):
		return fail(CodeWrongDevice, "%s: kubelet allocated the device of spoke %q to this pod; "+
			"the annotation k8s.v1.cni.cncf.io/resourceName of this network must be macvtap.k8slan.io/k8slan-veth-%s",
			r, r.deviceID, r.spokeOrPool())
	case r.mtu > record.MTU:
		return fail(types.ErrInvalidNetworkConfig, "%s: mtu %d is more than the LAN carries: %d", r, r.mtu, record.MTU)
	}
	return nil
}

// checkLAN returns an error if a record belongs to another LAN than the attachment's.
func (a attachment) checkLAN(record segment.Segment) error {
	if record.LAN.Namespace != a.lan.Namespace || record.LAN.Name != a.lan.Name {
		return fail(types.ErrInvalidNetworkConfig,
			"ns: %q is the network namespace of LAN %s, not of %s as lan says", a.netns, record.LAN, a.lan)
	}
	return nil
}

// record reads the node's record of the LAN. If there is none, the error has the code missing.
func (p *Plugin) record(a attachment, missing uint) (segment.Segment, error) {
	record, err := p.node.Record(a.netns)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, kernel.ErrNoLAN) {
		return record, a.noLAN(missing)
	}
	if err != nil {
		return record, fail(types.ErrIOFailure, "%s: the node's record of it: %v", a, err)
	}
	return record, a.checkLAN(record)
}

// attach makes the attachment. It adds an undo step to steps for each thing it does, and fills in o.
func (p *Plugin) attach(ctx context.Context, r request, steps *undo, o *report.Outcome) (*current.Result, error) {
	var err error
	if r.attachment, err = p.locate(r.attachment); err != nil {
		return nil, err
	}
	if r.vni != 0 {
		if err := p.checkMegalosEnabled(r.attachment, CodeForbidden); err != nil {
			return nil, err
		}
	}
	claim := r.claim()
	if r.vni != 0 && r.netns == netnsOnDemand(r.vni) {
		claim.Make = func(ctx context.Context) (segment.Segment, error) { return p.onDemandSegment(ctx, r.attachment) }
	}
	made, err := p.node.Claim(ctx, claim)
	if err != nil {
		return nil, r.explain(err)
	}
	*steps = append(*steps, func(ctx context.Context) error { return p.node.Release(ctx, r.netns, r.spoke, r.claimID) })
	o.TookOver = made.TookOver
	result := &current.Result{CNIVersion: current.ImplementedSpecVersion, DNS: r.dns}
	if r.ipam != "" {
		if result, err = p.assignAddresses(ctx, r, steps, o); err != nil {
			return nil, err
		}
	}
	// The result lists the bridge's end of the link without a sandbox, although it is in the LAN's network namespace:
	// Multus assumes that every interface with a sandbox is in the pod.
	result.Interfaces = []*current.Interface{
		{Name: made.HostInterface, Mtu: made.MTU},
		{Name: r.ifname, Mac: made.MAC.String(), Mtu: made.MTU, Sandbox: r.podNetns},
	}
	for _, ip := range result.IPs {
		ip.Interface = current.Int(1)
	}
	if r.vni != 0 {
		return result, nil // kubelet allocated nothing, so there is no CDI device
	}
	// The CDI device is written last, so that the runtime finds it only when the attachment is complete.
	*steps = append(*steps, func(context.Context) error { return cdi.Remove(p.host.CDI, r.spoke, r.claimID) })
	if err := cdi.Write(p.host.CDI, r.device(made)); err != nil {
		return nil, fail(CodeCDI, "%s: %v", r, err)
	}
	return result, nil
}

// assignAddresses lets the IPAM plugin allocate addresses and adds them to the pod's interface.
func (p *Plugin) assignAddresses(
	ctx context.Context, r request, steps *undo, o *report.Outcome,
) (*current.Result, error) {
	*steps = append(*steps, func(ctx context.Context) error {
		_, err := r.delegate(ctx, "DEL")
		return err
	})
	result, err := r.allocate(ctx)
	if err != nil {
		o.Reason = report.IPAM // whichever code the IPAM plugin returned
		return nil, err
	}
	if r.dns.IsEmpty() {
		r.dns = result.DNS
	}
	result.DNS = r.dns
	want, err := addressingOf(result)
	if err != nil {
		return nil, fail(CodeIPAM, "%s: IPAM plugin %s: %v", r, r.ipam, err)
	}
	if err := p.node.SetAddresses(ctx, r.podNetns, r.ifname, want); err != nil {
		return nil, r.explain(err)
	}
	return result, nil
}

// print writes the result in the version of CNI that the configuration has.
func (p *Plugin) print(result *current.Result, version string) error {
	converted, err := result.GetAsVersion(version)
	if err != nil {
		return fail(types.ErrIncompatibleCNIVersion,
			"the result cannot be converted to cniVersion %s: %v", version, err)
	}
	if err := converted.PrintTo(p.host.Stdout); err != nil {
		return fail(types.ErrIOFailure, "the result cannot be written: %v", err)
	}
	return nil
}

// claim returns the request as package kernel takes it.
func (r request) claim() kernel.ClaimRequest {
	return kernel.ClaimRequest{
		Netns: r.netns, Spoke: r.spoke, Kind: r.kind,
		Sandbox: r.sandbox, Interface: r.ifname, PodNetns: r.podNetns,
		PodNamespace: r.pod.namespace, Pod: r.pod.name, PodUID: r.pod.uid,
		MAC: r.mac, MTU: r.mtu, Promiscuous: r.promisc,
		Network: r.networkMark(), Admit: r.admit,
	}
}

// device returns the CDI device of this attachment: some environment variables and, for a macvtap, its tap.
func (r request) device(made kernel.Attachment) cdi.Device {
	prefix := "K8SLAN_" + envName(r.spokeOrPool()) + "_"
	d := cdi.Device{
		Netns: r.netns, Spoke: r.spoke, ClaimID: r.claimID,
		Env: []string{
			prefix + "LAN=" + r.lan.String(),
			prefix + "INTERFACE=" + r.ifname,
			prefix + "MAC=" + made.MAC.String(),
			prefix + "MTU=" + strconv.Itoa(made.MTU),
		},
	}
	if r.kind == segment.Macvtap {
		d.Path = fmt.Sprintf("/dev/tap%d", made.Index) // where libvirt and users of QEMU expect it
		d.Major, d.Minor, d.UID, d.GID = made.TapMajor, made.TapMinor, r.owner, r.group
		d.Env = append(d.Env, prefix+"TAP="+d.Path)
	}
	return d
}

// envName returns the name of a spoke or pool as part of an environment variable's name.
func envName(spoke string) string {
	return strings.Map(func(r rune) rune {
		if r == '-' || r == '.' {
			return '_'
		}
		return r
	}, strings.ToUpper(spoke))
}

// del removes the attachment. It succeeds if there is nothing to remove, and also for a configuration that ADD refuses:
// kubelet repeats a failed DEL for ever, so the pod would never be deleted.
func (p *Plugin) del(ctx context.Context, args *skel.CmdArgs, o *report.Outcome) error {
	w, _ := decode(args.StdinData)
	a, err := p.attachment(w, args)
	if err != nil {
		return nil //nolint:nilerr // see above
	}
	o.Kind = a.kind
	var failed []error
	if a.ipam != "" {
		if _, err := a.delegate(ctx, "DEL"); err != nil {
			o.Reason = report.IPAM
			failed = append(failed, err)
		}
	}
	candidates, err := p.candidates(a)
	if err != nil {
		failed = append(failed, err)
	}
	for _, a := range candidates {
		if err := p.releaseClaim(ctx, a); err != nil {
			failed = append(failed, err)
		}
	}
	return joinErrors(failed)
}

// releaseClaim releases the attachment's claim. If the runtime does not say which port of a pool it is on, releaseClaim
// finds the port in the kernel. The daemon cleans up after a claim that is no longer in the kernel.
func (p *Plugin) releaseClaim(ctx context.Context, a attachment) error {
	if a.spoke != "" {
		return p.release(ctx, a, a.spoke, a.claimID)
	}
	claims, err := p.claimsOf(ctx, a)
	if err != nil {
		return err
	}
	for _, c := range claims {
		if c.ID == a.claimID {
			return p.release(ctx, a, c.Spoke, c.ID)
		}
	}
	return nil
}

// claimsOf returns the claims in the attachment's LAN, and none if the LAN is not on this node.
func (p *Plugin) claimsOf(ctx context.Context, a attachment) ([]segment.Claim, error) {
	claims, err := p.node.Claims(ctx, a.netns)
	if err != nil && !errors.Is(err, kernel.ErrNoLAN) && !errors.Is(err, fs.ErrNotExist) {
		return nil, a.explain(err)
	}
	return claims, nil
}

// release removes one claim. The CDI device goes first, so that it never refers to a deleted link.
func (p *Plugin) release(ctx context.Context, a attachment, spoke, claimID string) error {
	if err := cdi.Remove(p.host.CDI, spoke, claimID); err != nil {
		return fail(CodeCDI, "%s: %v", a, err)
	}
	err := p.node.Release(ctx, a.netns, spoke, claimID)
	if err != nil && !errors.Is(err, kernel.ErrNoLAN) {
		return a.explain(err)
	}
	return nil
}

// joinErrors returns one CNI error for several, with the code of the first.
func joinErrors(failed []error) error {
	if len(failed) < 2 {
		return errors.Join(failed...)
	}
	code := types.ErrInternal
	if e, ok := errors.AsType[*types.Error](failed[0]); ok {
		code = e.Code
	}
	return types.NewError(code, failed[0].Error(), errors.Join(failed[1:]...).Error())
}

func (p *Plugin) check(ctx context.Context, args *skel.CmdArgs) error {
	r, err := p.request(args)
	if err != nil {
		return err
	}
	r, addresses, err := r.fromPrevResult()
	if err != nil {
		return err
	}
	if r.attachment, err = p.locate(r.attachment); err != nil {
		return err
	}
	if _, err := p.record(r.attachment, types.ErrTryAgainLater); err != nil {
		return err
	}
	if err := p.node.CheckClaim(ctx, r.claim()); err != nil {
		return fail(CodeChanged, "%s: %v", r, err)
	}
	if r.ipam != "" {
		if _, err := r.delegate(ctx, "CHECK"); err != nil {
			return err
		}
	}
	return p.checkAddresses(ctx, r, addresses)
}

// fromPrevResult returns the request with the MAC and MTU of ADD's result, and the addresses in that result.
func (r request) fromPrevResult() (request, []netip.Prefix, error) {
	if len(r.prevResult) == 0 || string(r.prevResult) == "null" {
		return r, nil, fail(types.ErrInvalidNetworkConfig,
			`network configuration has no "prevResult" for CHECK to compare with`)
	}
	prev, err := r.parseResult(r.prevResult)
	if err != nil {
		return r, nil, fail(types.ErrInvalidNetworkConfig, "prevResult cannot be read: %v", err)
	}
	at := slices.IndexFunc(prev.Interfaces, func(i *current.Interface) bool {
		return i != nil && i.Name == r.ifname && i.Sandbox == r.podNetns
	})
	if at < 0 {
		return r, nil, fail(types.ErrInvalidNetworkConfig,
			"prevResult has no interface %q in sandbox %s", r.ifname, r.podNetns)
	}
	if mac := prev.Interfaces[at].Mac; mac != "" {
		if r.mac, err = parseMAC("prevResult", mac, types.ErrInvalidNetworkConfig); err != nil {
			return r, nil, err
		}
	}
	if mtu := prev.Interfaces[at].Mtu; mtu != 0 {
		r.mtu = mtu
	}
	want, err := addressingOf(&current.Result{IPs: prev.IPs})
	if err != nil {
		return r, nil, fail(types.ErrInvalidNetworkConfig, "prevResult: %v", err)
	}
	return r, want.Addresses, nil
}

// checkAddresses returns an error if the pod's interface has lost one of the addresses.
func (p *Plugin) checkAddresses(ctx context.Context, r request, want []netip.Prefix) error {
	if len(want) == 0 {
		return nil
	}
	have, err := p.node.Addresses(ctx, r.podNetns, r.ifname)
	if err != nil {
		return fail(CodeChanged, "%s: %v", r, err)
	}
	for _, address := range want {
		if !slices.Contains(have, address) {
			return fail(CodeChanged, "%s: the pod's interface %s has lost its address %s", r, r.ifname, address)
		}
	}
	return nil
}

func (p *Plugin) gc(ctx context.Context, args *skel.CmdArgs) error {
	w, err := decode(args.StdinData)
	if err != nil {
		return err
	}
	a, err := p.attachment(w, args)
	if err != nil {
		return err
	}
	var failed []error
	if a.ipam != "" {
		if _, err := a.delegate(ctx, "GC"); err != nil {
			failed = append(failed, err)
		}
	}
	candidates, err := p.candidates(a)
	if err != nil {
		failed = append(failed, err)
	}
	for _, a := range candidates {
		claims, err := p.claimsOf(ctx, a)
		if err != nil {
			failed = append(failed, err)
		}
		for _, c := range stale(claims, a, w.ValidAttachments) {
			if err := p.release(ctx, a, c.Spoke, c.ID); err != nil {
				failed = append(failed, err)
			}
		}
	}
	return joinErrors(failed)
}

// stale returns the claims of the attachment's network that are not valid any more. The runtime calls GC for each
// network with the attachments of that network only.
func stale(claims []segment.Claim, a attachment, valid []types.GCAttachment) []segment.Claim {
	keep := map[string]bool{}
	for _, v := range valid {
		keep[segment.ClaimID(v.ContainerID, v.IfName)] = true
	}
	return slices.DeleteFunc(claims, func(c segment.Claim) bool { return !a.isOfNetwork(c) || keep[c.ID] })
}

func (p *Plugin) status(ctx context.Context, args *skel.CmdArgs) error {
	w, err := decode(args.StdinData)
	if err != nil {
		return err
	}
	a, err := p.attachment(w, args)
	if err != nil {
		return err
	}
	if a.vni != 0 {
		return p.statusOnDemand(ctx, a)
	}
	record, err := p.record(a, types.ErrPluginNotAvailable)
	switch {
	case err != nil:
		return err
	case !a.existsIn(record):
		return a.noSpoke(types.ErrPluginNotAvailable)
	case record.VXLAN.UnderlayIndex == 0:
		return fail(types.ErrLimitedConnectivity, "LAN %s: this node has no underlay device %q, "+
			"so the LAN's pods here reach no other node; see kubectl describe lan -n %s %s",
			a.lan, record.VXLAN.Underlay, a.lan.Namespace, a.lan.Name)
	case a.ipam != "":
		_, err := a.delegate(ctx, "STATUS")
		return err
	}
	return nil
}
