package install

import "testing"

func TestReleaseIsFoundByItsVersion(t *testing.T) {
	const list = "# Releases\n0.1.0 aaaa\n0.2.0 bbbb\n"
	for from, want := range map[string]string{"": "bbbb", "0.1.0": "aaaa", "0.2.0": "bbbb", "HEAD^": "HEAD^"} {
		if got := released(list, from); got != want {
			t.Errorf("upgrading from %q starts at commit %q, want %q", from, got, want)
		}
	}
	if got := released("# none yet\n", ""); got != "" {
		t.Errorf("without a release the commit is %q, want none", got)
	}
}
