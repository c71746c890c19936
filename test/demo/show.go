package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"

	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/test/cluster/install"
)

// show prints what is where, read from the cluster, and what passes between the three.
func show(ctx context.Context, out io.Writer, bed *install.Bed) error {
	for _, what := range [][]string{{"get", "lans"}, {"get", "pods", "-o", "wide"}} {
		text, err := bed.Kubectl(ctx, what...)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "\n$ kubectl %s\n%s", strings.Join(what, " "), text)
	}
	if err := showNodes(ctx, out, bed); err != nil {
		return err
	}
	fmt.Fprintln(out)
	var failed []error
	for _, p := range []ping{
		{"srl-1", "host-1", "192.0.2.2"},
		{"srl-1", "host-1", "2001:db8::2"},
		{"srl-1", "vm-1", "192.0.2.3"},
		{"srl-1", "vm-1", "2001:db8::3"},
		{"host-1", "vm-1", "192.0.2.3"},
		{"vm-1", "srl-1", "192.0.2.1"},
		{"vm-1", "host-1", "2001:db8::2"},
	} {
		failed = append(failed, p.show(ctx, out, bed))
	}
	return errors.Join(append(failed, showLLDP(ctx, out, bed))...)
}

// showNodes prints each node's segments from its LANNode.
func showNodes(ctx context.Context, out io.Writer, bed *install.Bed) error {
	text, err := bed.Kubectl(ctx, "get", "lannodes", "-o", "json")
	if err != nil {
		return err
	}
	var nodes v1beta1.LANNodeList
	if err := json.Unmarshal([]byte(text), &nodes); err != nil {
		return fmt.Errorf("read the LANNodes: %w", err)
	}
	for _, n := range nodes.Items {
		fmt.Fprintf(out, "\n%s\n", n.Name)
		for _, s := range n.Status.Segments {
			fmt.Fprintf(out, " └ LAN %s  mtu %d  netns %s  %s\n    ├ vxlan over %s (%s)\n", s.LAN, s.MTU, s.NS, s.State,
				s.Underlay, s.VTEP)
			for _, a := range s.Attachments {
				fmt.Fprintf(out, "    ├ %-5s %-7s %s  %s  %s\n", a.Spoke, a.Kind, a.Pod, a.Interface, a.MAC)
			}
		}
	}
	return nil
}

// ping is one question from a pod, or from the guest of the VM's pod, to an address in the LAN.
type ping struct{ from, to, address string }

var (
	received  = regexp.MustCompile(`(\d+) packets transmitted, (\d+) (?:packets )?received`)
	roundTrip = regexp.MustCompile(`min/avg/max\S* = [\d.]+/([\d.]+)/`)
)

func (p ping) show(ctx context.Context, out io.Writer, bed *install.Bed) error {
	command := []string{"exec", p.from, "--"}
	if p.from == "vm-1" {
		command = append(command, "/vm", "exec")
	}
	text, err := bed.Kubectl(ctx, append(command, "ping", "-c", "3", "-W", "2", p.address)...)
	counts, times := received.FindStringSubmatch(text), roundTrip.FindStringSubmatch(text)
	if err != nil || counts == nil || times == nil || counts[1] != counts[2] {
		fmt.Fprintf(out, "ping %-6s → %-6s  %-12s FAILED\n", p.from, p.to, p.address)
		return errors.Join(fmt.Errorf("ping %s from %s: %s", p.address, p.from, text), err)
	}
	fmt.Fprintf(out, "ping %-6s → %-6s  %-12s %s/%s  %s ms\n", p.from, p.to, p.address, counts[2], counts[1], times[1])
	return nil
}

// showLLDP sends a frame that ordinary bridges swallow from a pod on one node to the VM on the other.
func showLLDP(ctx context.Context, out io.Writer, bed *install.Bed) error {
	err := sendLLDP(ctx, bed)
	if err != nil {
		fmt.Fprintln(out, "LLDP srl-1  → vm-1    NOT SEEN")
		return fmt.Errorf("send LLDP from srl-1 to vm-1: %w", err)
	}
	fmt.Fprintln(out, "LLDP srl-1  → vm-1    seen")
	return nil
}

// sendLLDP returns when the frame was seen in the guest.
func sendLLDP(ctx context.Context, bed *install.Bed) error {
	listen := bed.KubectlCommand(ctx, "exec", "vm-1", "--", "/vm", "exec", "frames", "-i", "eth0", "listen",
		"--ethertype", "0x88cc", "-n", "1", "--for", "20s")
	stderr, err := listen.StderrPipe()
	if err != nil {
		return err
	}
	if err := listen.Start(); err != nil {
		return err
	}
	lines := bufio.NewScanner(stderr)
	for lines.Scan() && !strings.Contains(lines.Text(), "listening") {
	}
	_, err = bed.Kubectl(ctx, "exec", "srl-1", "--", "frames", "-i", "e1-1", "catalog", "--name", "lldp")
	return errors.Join(err, listen.Wait())
}

func next(bed *install.Bed) string {
	return fmt.Sprintf(`  export KUBECONFIG=%s PATH=$PATH:%s
  kubectl get lans,lannodes -A
  kubectl describe lan lan-example
  kubectl exec -it srl-1 -- ping 192.0.2.3
  kubectl exec -it vm-1 -- /vm exec ip addr          # in the guest
  go run ./test/cluster/cmd/cluster exec worker1 -- nsenter --net=/run/k8slan/netns/knlvrf ip -d link
  make cluster-down                                  # removes all of it
`, bed.Cluster.Kubeconfig(), bed.ToolDir())
}
