package kernel

import (
	"errors"
	"fmt"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

func TestNamesThatCouldLeaveTheFolderAreRefused(t *testing.T) {
	n := New(Paths{Run: t.TempDir()})
	for _, name := range []string{"", ".", "..", "../../etc", "a/b", "a\x00b"} {
		if _, err := n.Record(name); err == nil || errors.Is(err, ErrNoLAN) {
			t.Errorf("the record of %q is read: %v", name, err)
		}
		if _, err := n.Reconcile(t.Context(), name, segment.Teardown); err == nil {
			t.Errorf("%q is reconciled", name)
		}
		if err := n.Release(t.Context(), name, "srl", "k1"); err == nil {
			t.Errorf("a claim in %q is released", name)
		}
	}
}

func TestRecordIsReadBack(t *testing.T) {
	n := New(Paths{Run: t.TempDir()})
	if _, err := n.Record("knlvrf"); !errors.Is(err, ErrNoLAN) {
		t.Errorf("the record of a LAN that is not on the node: %v, want %v", err, ErrNoLAN)
	}
	lan := segment.LAN{Namespace: "default", Name: "lab", UID: "1"}
	want := segment.Segment{LAN: lan, Netns: "knlvrf", Spokes: []string{"srl"}}
	if err := n.writeRecord(want); err != nil {
		t.Fatal(err)
	}
	if got, err := n.Record("knlvrf"); err != nil || !got.Equal(want) {
		t.Errorf("read back %+v, %v", got, err)
	}
}

func TestTapsOfALANHaveDifferentIndexes(t *testing.T) {
	lan := segment.LAN{Namespace: "default", Name: "lab"}
	seen := map[int]string{}
	for i := range segmentMax {
		spoke := fmt.Sprintf("s%d", i)
		index := tapIndex(lan, spoke, 0)
		if other, taken := seen[index]; taken {
			t.Errorf("%s and %s both have %d", spoke, other, index)
		}
		if index < tapIndexMin || index >= tapIndexMin+tapIndexSpan {
			t.Errorf("%s has %d, which is not in the range for taps", spoke, index)
		}
		seen[index] = spoke
	}
	if tapIndex(lan, "srl", 0) == tapIndex(lan, "srl", 1) {
		t.Error("the second try has the index of the first")
	}
}

const segmentMax = 500 // spokes of the largest LAN

func TestKernelReleasesAreCompared(t *testing.T) {
	for release, want := range map[string]bool{
		"6.15.0": true, "6.18.3-arch1-1": true, "7.0": true, "6.15-rc1": true,
		"6.14.11": false, "5.14.0-503.el9.x86_64": false, "6.1.0-28-amd64": false, "": false, "next": false,
	} {
		if atLeast(release, 6, 15) != want {
			t.Errorf("%q is at least 6.15: %t", release, !want)
		}
	}
}
