package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

// run runs k8slan with arguments, and returns what it printed.
func run(args ...string) (string, error) {
	var out bytes.Buffer
	root := rootCommand()
	root.SetOut(&out)
	root.SetArgs(args)
	err := root.Execute()
	return out.String(), err
}

func TestVersionIsPrinted(t *testing.T) {
	if out, err := run("version"); err != nil || !strings.HasPrefix(out, "k8slan development go") {
		t.Errorf("%q, %v", out, err)
	}
}

func TestEveryCommandHelps(t *testing.T) {
	for _, c := range []struct {
		command string
		want    []string
	}{
		{"node", []string{"--node-name", "NODE_NAME", "--health-address", "--log-level", "/readyz"}},
		{"controller", []string{"--leader-elect", "POD_NAMESPACE", "--health-address", "--log-level"}},
		{"reflector", []string{"--as", "POD_IP", "--password-file", "/readyz"}},
		{"clean", []string{"--host", "kubectl debug"}},
		{"prepare-upgrade", []string{"--timeout", "CRDs"}},
		{"version", []string{"Usage"}},
	} {
		out, err := run(c.command, "--help")
		if err != nil {
			t.Errorf("%s: %v", c.command, err)
		}
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("%s --help does not have %s:\n%s", c.command, want, out)
			}
		}
	}
}

func TestMistakesInTheCommandLineExitWithTwo(t *testing.T) {
	t.Setenv("NODE_NAME", "")
	t.Setenv("POD_NAMESPACE", "")
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"node"}, "NODE_NAME"},
		{[]string{"node", "--log-format", "xml", "--node-name", "n"}, "--log-format"},
		{[]string{"node", "--nonsense"}, "k8slan node --help"},
		{[]string{"clean", "/somewhere"}, "takes no arguments"},
		{[]string{"reflector"}, "--as"},
		{[]string{"reflector", "--as", "65000", "--listen", "nowhere"}, "--listen"},
		{[]string{"node", "--node-name", "n", "--evpn-peer", "address=192.0.2.1"}, "--evpn-as"},
		{[]string{"node", "--node-name", "n", "--evpn-reflectors", "k8slan-reflector"}, "POD_NAMESPACE"},
		{[]string{"node", "--node-name", "n", "--pod-namespace", "s", "--evpn-reflectors", "reflector"}, "--evpn-as"},
	} {
		_, err := run(c.args...)
		if err == nil || !strings.Contains(err.Error(), c.want) || exitCode(err) != 2 {
			t.Errorf("%q: %v, exit %d; want 2 and %q", c.args, err, exitCode(err), c.want)
		}
	}
	if exitCode(errors.New("a failure")) != 1 {
		t.Error("a failure does not exit with 1")
	}
}
