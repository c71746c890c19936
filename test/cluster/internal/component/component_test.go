package component

import (
	"testing"
	"testing/fstest"
)

func TestKeyChangesWithWhatIsBuilt(t *testing.T) {
	module := func(mod, sum string) fstest.MapFS {
		return fstest.MapFS{"go.mod": {Data: []byte(mod)}, "go.sum": {Data: []byte(sum)}}
	}
	base := Component{Name: "etcd", Packages: "tool"}
	seen := map[string]string{}
	for name, test := range map[string]struct {
		component Component
		module    fstest.MapFS
	}{
		"unchanged":            {base, module("a", "b")},
		"another version":      {base, module("a2", "b")},
		"other checksums":      {base, module("a", "b2")},
		"text moved to go.sum": {base, module("", "ab")},
		"a main.go in addition": {
			base,
			fstest.MapFS{"go.mod": {Data: []byte("a")}, "go.sum": {Data: []byte("b")}, "main.go": {}},
		},
		"other tags":         {Component{Name: "etcd", Packages: "tool", Tags: "x"}, module("a", "b")},
		"other linker flags": {Component{Name: "etcd", Packages: "tool", LDFlags: "-X a=b"}, module("a", "b")},
		"another link":       {Component{Name: "etcd", Packages: "tool", Links: []string{"a=b"}}, module("a", "b")},
	} {
		key, err := test.component.key(test.module)
		if err != nil {
			t.Fatal(err)
		}
		if other, taken := seen[key]; taken {
			t.Errorf("%q has the same key as %q", name, other)
		}
		seen[key] = name
	}
	again, err := base.key(module("a", "b"))
	if err != nil {
		t.Fatal(err)
	}
	if seen[again] != "unchanged" {
		t.Error("the same input has another key")
	}
}

func TestKubernetesKnowsItsVersion(t *testing.T) {
	got := kubernetesVersion("v1.36.3")
	want := "-X k8s.io/component-base/version.gitVersion=v1.36.3 -X k8s.io/component-base/version.gitMajor=1 -X " +
		"k8s.io/component-base/version.gitMinor=36"
	if len(got) < len(want) || got[:len(want)] != want {
		t.Errorf("got  %s\nwant %s …", got, want)
	}
}
