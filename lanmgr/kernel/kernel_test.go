package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

func TestNamesThatCouldLeaveTheFolderAreRefused(t *testing.T) {
	n := New(Paths{Run: t.TempDir()})
	for _, name := range []string{"", ".", "..", "../../etc", "a/b", "a\x00b"} {
		if _, err := n.Record(name); err == nil || errors.Is(err, ErrNoLAN) {
			t.Errorf("record of %q: %v", name, err)
		}
		if _, err := n.Reconcile(t.Context(), name, segment.Teardown); err == nil {
			t.Errorf("reconcile of %q was not refused", name)
		}
		if err := n.Release(t.Context(), name, "srl", "k1"); err == nil {
			t.Errorf("release in %q was not refused", name)
		}
	}
}

func TestRecordIsReadBackWholeOrNotAtAll(t *testing.T) {
	n := New(Paths{Run: t.TempDir()})
	if _, err := n.Record("knlvrf"); !errors.Is(err, ErrNoLAN) {
		t.Errorf("record of a LAN that is not here: %v", err)
	}
	want := segment.Segment{LAN: segment.LAN{Namespace: "default", Name: "lab", UID: "1"}, Netns: "knlvrf", Spokes: []string{"srl"}}
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

func TestRoutesThatAreNoDefaultRoutesDoNotMatter(t *testing.T) {
	message := func(kind uint16, dstLen byte) []byte {
		b := make([]byte, unix.SizeofNlMsghdr+unix.SizeofRtMsg)
		binary.NativeEndian.PutUint32(b, uint32(len(b)))
		binary.NativeEndian.PutUint16(b[4:], kind)
		b[unix.SizeofNlMsghdr+1] = dstLen
		return b
	}
	for _, tt := range []struct {
		name string
		msg  []byte
		want bool
	}{
		{"a route to a pod", message(unix.RTM_NEWROUTE, 32), false},
		{"the default route", message(unix.RTM_DELROUTE, 0), true},
		{"a link", message(unix.RTM_NEWLINK, 24), true},
		{"routes, the default one among them", append(message(unix.RTM_NEWROUTE, 24), message(unix.RTM_NEWROUTE, 0)...), true},
		{"damaged", []byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, true},
	} {
		if got := matters(tt.msg); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

func TestAKernelsReleaseIsCompared(t *testing.T) {
	for release, want := range map[string]bool{
		"6.15.0": true, "6.18.3-arch1-1": true, "7.0": true, "6.15-rc1": true,
		"6.14.11": false, "5.14.0-503.el9.x86_64": false, "6.1.0-28-amd64": false, "": false, "next": false,
	} {
		if atLeast(release, 6, 15) != want {
			t.Errorf("%q is at least 6.15: %t", release, !want)
		}
	}
}
