package main

import (
	"strings"
	"testing"
)

func at(lan, node, pod, spoke string) location {
	return location{lan: lan, ns: lan, node: node, spoke: spoke, pod: pod}
}

func TestALANIsProbedFromOneNodeToEachOther(t *testing.T) {
	all := []location{
		at("default/lab", "n1", "default/a", "a"), at("default/lab", "n1", "default/b", "b"),
		at("default/other", "n1", "default/a", "x"),
		at("default/lab", "n2", "default/c", "c"), at("default/lab", "n2", "default/d", "d"),
		at("default/lab", "n3", "default/e", "e"),
		at("default/single", "n1", "default/a", "s"),
		at("default/near", "n1", "default/a", "p"), at("default/near", "n1", "default/b", "q"),
	}
	for lan, want := range map[string]string{
		"default/lab":    "a-c a-e",
		"default/near":   "p-q",
		"default/single": "only pod default/a is attached to LAN default/single",
		"default/none":   "no pod is attached to LAN default/none",
	} {
		pairs, err := pairsAcrossNodes(all, lan)
		var got []string
		for _, p := range pairs {
			got = append(got, p[0].spoke+"-"+p[1].spoke)
		}
		text := strings.Join(got, " ")
		if err != nil {
			text = err.Error()
		}
		if !strings.Contains(text, want) {
			t.Errorf("%s: %s, want %s", lan, text, want)
		}
	}
}

func TestTwoPodsAreProbedOnTheLANThatTheyShare(t *testing.T) {
	all := []location{
		at("default/lab", "n1", "default/a", "web_0"), at("default/lab", "n2", "default/b", "web_0"),
		at("default/two", "n1", "default/a", "x"),
		at("default/two", "n2", "default/c", "y"), at("default/three", "n1", "default/a", "z"),
		at("default/three", "n2", "default/c", "w"), at("default/four", "n3", "default/d", "v"),
	}
	for _, c := range []struct{ one, two, lan, want string }{
		{"a", "default/b", "", "web_0 web_0"},
		{"a", "c", "default/three", "z w"},
		{"x", "c", "", "x y"},
		{
			"a", "c", "",
			"meet more than once: default/a (x) and default/c (y) of LAN default/two, default/a (z) and default/c " +
				"(w) of LAN default/three",
		},
		{"web_0", "web_0", "", "meet more than once"},
		{"a", "d", "", "a and d are on no LAN together"},
		{"a", "other/b", "", "other/b is neither an attached pod in namespace default nor an attached spoke"},
		{"a", "absent", "", "absent is neither an attached pod in namespace default nor an attached spoke"},
	} {
		pair, err := findPair(all, "default", c.one, c.two, c.lan)
		text := pair[0].spoke + " " + pair[1].spoke
		if err != nil {
			text = err.Error()
		}
		if !strings.Contains(text, c.want) {
			t.Errorf("%s and %s: %s, want %s", c.one, c.two, text, c.want)
		}
	}
}
