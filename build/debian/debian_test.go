package debian

import (
	"context"
	"os"
	"os/exec"
	"slices"
	"testing"
)

func TestMissingNamesOnlyWhatIsNotInstalled(t *testing.T) {
	needDebian(t)
	got, err := Missing(context.Background(), "dpkg", "no-such-package-b", "apt", "no-such-package-a")
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"no-such-package-b", "no-such-package-a"}; !slices.Equal(got, want) {
		t.Fatalf("missing %q, want %q", got, want)
	}
}

func TestMissingFailsWhenDpkgCannotBeAsked(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if missing, err := Missing(context.Background(), "dpkg"); err == nil {
		t.Fatalf("without dpkg-query the answer is %q, want an error", missing)
	}
}

// needDebian skips the test, or fails it under K8SLAN_NO_SKIP=1, on another
// distribution.
func needDebian(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("dpkg-query"); err != nil {
		if os.Getenv("K8SLAN_NO_SKIP") == "1" {
			t.Fatal("needs Debian: ", err)
		}
		t.Skip("needs Debian: ", err)
	}
}
