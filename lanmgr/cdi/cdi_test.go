package cdi_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	specs "tags.cncf.io/container-device-interface/specs-go"

	"github.com/k8slan/k8slan/lanmgr/cdi"
)

// read returns the only file of the directory as a runtime reads it.
func read(t *testing.T, dir string) specs.Spec {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(paths) != 1 {
		t.Fatalf("the directory has %v, %v; want one file", paths, err)
	}
	b, err := os.ReadFile(paths[0])
	if err != nil {
		t.Fatal(err)
	}
	var s specs.Spec
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestTapIsADeviceNodeOfItsOwner(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cdi") // the runtime has not created it yet
	vm := cdi.Device{
		Netns: "knlvrf", Spoke: "vm", ClaimID: "k1", Path: "/dev/tap7", Major: 240, Minor: 3,
		UID: 107, GID: 107, Env: []string{"A=1"},
	}
	if err := cdi.Write(dir, vm); err != nil {
		t.Fatal(err)
	}
	s := read(t, dir)
	if s.Kind+"="+s.Devices[0].Name != cdi.Name("vm") {
		t.Errorf("the device is %s=%s, but the device plugin answers %s", s.Kind, s.Devices[0].Name, cdi.Name("vm"))
	}
	edits := s.Devices[0].ContainerEdits
	if len(edits.DeviceNodes) != 1 || edits.Env[0] != "A=1" {
		t.Fatalf("the edits are %+v", edits)
	}
	node := edits.DeviceNodes[0]
	if node.Path != "/dev/tap7" || node.Major != 240 || node.Minor != 3 ||
		*node.UID != 107 || *node.GID != 107 || *node.FileMode != 0o600 {
		t.Errorf("the device node is %+v", node)
	}
}

func TestDeviceOfAnEarlierClaimIsReplaced(t *testing.T) {
	dir := t.TempDir()
	for _, claim := range []string{"k1", "k2"} {
		d := cdi.Device{Netns: "knlvrf", Spoke: "srl", ClaimID: claim, Env: []string{"CLAIM=" + claim}}
		if err := cdi.Write(dir, d); err != nil {
			t.Fatal(err)
		}
	}
	if env := read(t, dir).Devices[0].ContainerEdits.Env[0]; env != "CLAIM=k2" {
		t.Errorf("the spoke's device has %s", env)
	}
	if err := cdi.Remove(dir, "srl", "k1"); err != nil { // the first claim ends late
		t.Fatal(err)
	}
	left, err := cdi.List(dir)
	if err != nil || len(left) != 1 || left[0].ClaimID != "k2" || left[0].Netns != "knlvrf" {
		t.Fatalf("the devices %+v are left, %v", left, err)
	}
	for range 2 {
		if err := cdi.Remove(dir, "srl", "k2"); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := cdi.List(dir); err != nil || len(left) != 0 {
		t.Errorf("the devices %+v are left, %v", left, err)
	}
}

func TestWriteRemovesNoOtherFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "nvidia.yaml"), []byte("kind: nvidia.com/gpu"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, spoke := range []string{"srl", "srl-1", "srl.1"} {
		d := cdi.Device{Netns: "n", Spoke: spoke, ClaimID: "k1", Env: []string{"A=1"}}
		if err := cdi.Write(dir, d); err != nil {
			t.Fatal(err)
		}
	}
	if err := cdi.Write(dir, cdi.Device{Netns: "n", Spoke: "srl", ClaimID: "k2", Env: []string{"A=1"}}); err != nil {
		t.Fatal(err)
	}
	ours, err := cdi.List(dir)
	if err != nil || len(ours) != 3 {
		t.Errorf("our devices are %+v, %v", ours, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "nvidia.yaml")); err != nil {
		t.Error(err)
	}
}

// A spoke may have the name of an earlier pool that still has claims on its ports.
func TestDeviceOfAPortStaysWhenASpokeHasThePoolsName(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []cdi.Device{
		{Spoke: "web_3", ClaimID: "k1"}, {Spoke: "web", ClaimID: "k2"}, {Spoke: "web", ClaimID: "k3"},
	} {
		if err := cdi.Write(dir, d); err != nil {
			t.Fatal(err)
		}
	}
	left, err := cdi.List(dir)
	if err != nil || len(left) != 2 || left[0].ClaimID != "k1" || left[1].ClaimID != "k3" {
		t.Errorf("the directory has %+v, %v; want the spoke's last device and the port's", left, err)
	}
}
