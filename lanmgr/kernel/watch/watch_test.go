package watch

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
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
	both := slices.Concat(message(unix.RTM_NEWROUTE, 24), message(unix.RTM_NEWROUTE, 0))
	for _, tt := range []struct {
		name string
		msg  []byte
		want bool
	}{
		{"a route to a pod", message(unix.RTM_NEWROUTE, 32), false},
		{"the default route", message(unix.RTM_DELROUTE, 0), true},
		{"a link", message(unix.RTM_NEWLINK, 24), true},
		{"a route, and the default one", both, true},
		{"damaged", []byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, true},
	} {
		if got := matters(tt.msg); got != tt.want {
			t.Errorf("%s matters: %t, want %t", tt.name, got, tt.want)
		}
	}
}

// endless is a source that runs until its context ends, and then sets ended.
func endless(name string, ended *bool) source {
	return source{name, func() (runFunc, error) {
		return func(ctx context.Context) error {
			<-ctx.Done()
			*ended = true
			return nil
		}, nil
	}}
}

func TestWatchEndsAllSourcesWhenOneFails(t *testing.T) {
	failure := errors.New("no memory")
	for name, open := range map[string]openFunc{
		"one does not open": func() (runFunc, error) { return nil, failure },
		"one ends": func() (runFunc, error) {
			return func(context.Context) error { return failure }, nil
		},
	} {
		ended := false
		err := run(t.Context(), []source{endless("links", &ended), {"mounts", open}}, func() {})
		if !errors.Is(err, failure) || !strings.HasPrefix(err.Error(), "watch mounts: ") {
			t.Errorf("%s: watching ends with %v", name, err)
		}
		if !ended {
			t.Errorf("%s: the other source goes on", name)
		}
	}
}

func TestWatchBeginsWhenAllSourcesAreOpen(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	ended, opened := false, 0
	count := func() (runFunc, error) {
		opened++
		return func(context.Context) error { return nil }, nil
	}
	err := run(ctx, []source{endless("links", &ended), {"records", count}, {"mounts", count}}, func() {
		if opened != 2 {
			t.Errorf("watching begins with %d of 2 other sources", opened)
		}
		cancel()
	})
	if err != nil || !ended {
		t.Errorf("watching ends with %v, with its source ended: %t", err, ended)
	}
}
