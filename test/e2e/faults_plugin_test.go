package e2e

import (
	"context"
	"fmt"
	"strings"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// sandbox is a network namespace on a node. Tests attach it by a call of the CNI plugin, without kubelet, containerd
// and Multus.
type sandbox struct {
	machine
	lan, spoke string
}

// sandbox creates the namespace for the time of the test.
func (m machine) sandbox(lan, spoke string) sandbox {
	m.Helper()
	s := sandbox{m, lan, spoke}
	m.run("ip", "netns", "add", s.name())
	m.afterwards("ip", "netns", "del", s.name())
	return s
}

func (s sandbox) name() string { return "e2e-" + s.spoke }

// call calls the plugin as Multus does for a pod to which kubelet has allocated the spoke.
func (s sandbox) call(verb string) error {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), patience)
	defer cancel()
	config := fmt.Sprintf(`{"cniVersion": "1.1.0", "name": "%s", "type": "k8slan", "kind": "veth", "lan": "%s/%s", `+
		`"ns": "%[2]s.%[3]s", "spoke": "%[4]s", "deviceID": "%[4]s"}`,
		v1beta1.VethNAD(s.spoke), s.namespace, s.lan, s.spoke)
	out, err := s.Exec(ctx, "env", "CNI_COMMAND="+verb, "CNI_CONTAINERID="+s.name(), "CNI_NETNS=/run/netns/"+s.name(),
		"CNI_IFNAME=net1", "CNI_PATH=/opt/cni/bin",
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE="+s.namespace+";K8S_POD_NAME="+s.name()+";K8S_POD_UID=1",
		"sh", "-c", "echo '"+config+"' | /opt/cni/bin/k8slan")
	if err != nil {
		return fmt.Errorf("%s: %w: %s", verb, err, out)
	}
	return nil
}

// must calls the plugin, which must succeed.
func (s sandbox) must(verb string) {
	s.Helper()
	if err := s.call(verb); err != nil {
		s.Fatal(err)
	}
}

// pings wants an address on the LAN to answer.
func (s sandbox) pings(from, to string) {
	s.Helper()
	s.run("ip", "-n", s.name(), "addr", "replace", from+"/24", "dev", "net1")
	out := s.run("ip", "netns", "exec", s.name(), "ping", "-c", "2", "-i", "0.1", "-W", "5", to)
	if !strings.Contains(out, " 0% packet loss") {
		s.Errorf("ping %s: %s", to, out)
	}
}
