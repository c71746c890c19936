package segment_test

import (
	"strings"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

func TestAliasHasTheClaim(t *testing.T) {
	want := claim("srl", segment.Veth)
	got, ok := segment.ParseAlias(want.ID, want.Alias())
	if !ok || got.Alias() != want.Alias() || !got.Since.Equal(want.Since) || got.MAC.String() != want.MAC.String() {
		t.Errorf("the alias is read as %+v, want %+v", got, want)
	}
	if !got.OfSandbox("c0ffee") || got.OfSandbox("decaf") {
		t.Error("the claim is not of its sandbox, or is of another")
	}
	long := want
	long.Pod, long.PodNamespace = strings.Repeat("p", 253), strings.Repeat("n", 63)
	long.Sandbox = strings.Repeat("a", 64)
	got, ok = segment.ParseAlias(long.ID, long.Alias())
	if len(long.Alias()) > 255 || !ok || got.Spoke != "srl" || !got.OfSandbox(long.Sandbox) {
		t.Errorf("a long alias of %d bytes is read as %+v", len(long.Alias()), got)
	}
	if _, ok := segment.ParseAlias("k", "uplink to spine 3"); ok {
		t.Error("another alias is read as a claim")
	}
}

func TestClaimIsOfItsPodHoweverLongTheName(t *testing.T) {
	for _, pod := range []string{"srl-1", strings.Repeat("long-", 50)} {
		c := claim("srl", segment.Veth)
		c.Pod = pod
		got, _ := segment.ParseAlias(c.ID, c.Alias())
		if !got.IsOf("default", pod) {
			t.Errorf("%+v is not of its pod %s", got, pod)
		}
		if got.IsOf("default", "srl-12") || got.IsOf("other", pod) || got.IsOf("default", "another") {
			t.Errorf("%+v is of another pod, too", got)
		}
	}
}
