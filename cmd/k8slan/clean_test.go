package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCleanRemovesOnlyFilesOfK8slan(t *testing.T) {
	dir := t.TempDir()
	ours := []string{
		"cni/k8slan", "cni/.k8slan-new-1", "plugins/k8slan-srl.sock",
		"cdi/macvtap.k8slan.io-spoke_srl_k1.json", "cdi/macvtap.k8slan.io-spoke_srl_k1.tmp",
		"run/lan/default.lab.json", "run/lock/default.lab",
	}
	others := []string{"cni/bridge", "plugins/kubelet.sock", "plugins/other.sock", "cdi/nvidia.json"}
	for _, f := range append(ours, others...) {
		path := filepath.Join(dir, f)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{
		"clean", "--run-dir", dir + "/run", "--cdi-dir", dir + "/cdi",
		"--device-plugin-dir", dir + "/plugins", "--cni-dir", dir + "/cni", "--nftables=false",
	}
	for range 2 { // it can be repeated
		out, err := run(args...)
		if err != nil || !strings.Contains(out, "nothing of k8slan is left") {
			t.Fatalf("%q, %v", out, err)
		}
		for _, f := range append(ours, "run") {
			if _, err := os.Lstat(filepath.Join(dir, f)); err == nil {
				t.Errorf("%s still exists", f)
			}
		}
		for _, f := range others {
			if _, err := os.Lstat(filepath.Join(dir, f)); err != nil {
				t.Errorf("a file of another program was removed: %v", err)
			}
		}
	}
}
