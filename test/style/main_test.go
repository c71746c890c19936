package main

import "testing"

func TestWordsAreCountedInTextAndIdentifiers(t *testing.T) {
	var f findings
	f.add("lanmgr/x.go", "// It tells nobody.\nvar toldChanges, foretold, intel int\nfunc WhoIsHeard() {}\n")
	f.add("lanmgr/x_test.go", "// anew\n")
	f.add("docs/x.md", "strangers\n")
	if len(f.product) != 4 || len(f.elsewhere) != 2 {
		t.Errorf("found %q in the product and %q elsewhere, want 4 and 2", f.product, f.elsewhere)
	}
}

func TestWideLinesAreFoundWhereTheyCanBeBroken(t *testing.T) {
	wide := make([]byte, 121)
	for i := range wide {
		wide[i] = 'x'
	}
	for _, c := range []struct {
		name, line string
		want       int
	}{
		{"a.go", "// " + string(wide), 1},
		{"a.go", "\t" + string(wide[:117]), 1},
		{"a.go", "\t" + string(wide[:116]), 0},
		{"a.go", "// +kubebuilder:" + string(wide), 0},
		{"a.go", "// https://" + string(wide), 0},
		{"a.md", string(wide), 1},
		{"a.md", "| " + string(wide), 0},
		{"a.md", "```\n" + string(wide) + "\n```", 0},
	} {
		var f findings
		f.add(c.name, c.line)
		if len(f.wide) != c.want {
			t.Errorf("%s: %.20q… has %d wide lines, want %d", c.name, c.line, len(f.wide), c.want)
		}
	}
}
