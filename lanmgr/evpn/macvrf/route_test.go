package macvrf_test

import (
	"testing"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

func TestParseTarget(t *testing.T) {
	for text, want := range map[string]macvrf.Target{
		"65000:222":        {0, 2, 0xfd, 0xe8, 0, 0, 0, 222},
		"65000:16777215":   {0, 2, 0xfd, 0xe8, 0, 0xff, 0xff, 0xff},
		"4200000000:65535": {2, 2, 0xfa, 0x56, 0xea, 0, 0xff, 0xff},
	} {
		if got, err := macvrf.ParseTarget(text); err != nil || got != want {
			t.Errorf("%s: %x, %v", text, got, err)
		}
	}
	for _, bad := range []string{"", "65000", "65000:", ":1", "a:b", "70000:70000", "-1:1", "1:4294967296", "1:2:3"} {
		if got, err := macvrf.ParseTarget(bad); err == nil {
			t.Errorf("%q is read as %x", bad, got)
		}
	}
}
