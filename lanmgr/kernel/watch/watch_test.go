package watch

import (
	"encoding/binary"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOnlyDefaultRoutesMatter(t *testing.T) {
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
		{"a route, and the default route", slices.Concat(message(unix.RTM_NEWROUTE, 24), message(unix.RTM_NEWROUTE, 0)), true},
		{"damaged", []byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, true},
	} {
		if got := matters(tt.msg); got != tt.want {
			t.Errorf("%s matters: %t, want %t", tt.name, got, tt.want)
		}
	}
}
