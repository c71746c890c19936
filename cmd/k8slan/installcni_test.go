package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// install installs a plugin of the given content.
func install(t *testing.T, content, dir string) (installed bool, err error) {
	t.Helper()
	source := filepath.Join(t.TempDir(), "k8slan-cni")
	if err := os.WriteFile(source, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return installCNI(source, filepath.Join(dir, pluginName))
}

func wantInstalled(t *testing.T, dir, content string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "k8slan" {
		t.Fatalf("%s has %v, %v; want only k8slan", dir, entries, err)
	}
	info, err := entries[0].Info()
	if err != nil || info.Mode() != 0o755 {
		t.Errorf("mode %v, %v; want 0755", info.Mode(), err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "k8slan")); string(got) != content || err != nil {
		t.Errorf("content %q, %v; want %q", got, err, content)
	}
}

func TestThePluginIsInstalledAndReplacedWhole(t *testing.T) {
	dir := t.TempDir()
	for _, content := range []string{"old plugin", "new plugin, longer", "short"} {
		if installed, err := install(t, content, dir); !installed || err != nil {
			t.Fatalf("installed is %t, %v", installed, err)
		}
		wantInstalled(t, dir, content)
	}
}

// A running plugin keeps its file, and a reader of the old one never sees the new one's bytes.
func TestTheOldPluginStaysWholeForAReader(t *testing.T) {
	dir := t.TempDir()
	if _, err := install(t, "old plugin", dir); err != nil {
		t.Fatal(err)
	}
	old, err := os.Open(filepath.Join(dir, "k8slan"))
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if _, err := install(t, "new plugin", dir); err != nil {
		t.Fatal(err)
	}
	content := make([]byte, 20)
	n, err := old.Read(content)
	if string(content[:n]) != "old plugin" || err != nil {
		t.Errorf("read %q, %v", content[:n], err)
	}
}

func TestTheSamePluginIsNotWrittenAgain(t *testing.T) {
	dir := t.TempDir()
	if _, err := install(t, "plugin", dir); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(filepath.Join(dir, "k8slan"))
	if err != nil {
		t.Fatal(err)
	}
	if installed, err := install(t, "plugin", dir); installed || err != nil {
		t.Errorf("installed is %t, %v", installed, err)
	}
	if after, err := os.Stat(filepath.Join(dir, "k8slan")); err != nil || !os.SameFile(before, after) {
		t.Errorf("the file was replaced, %v", err)
	}
}

func TestAPluginWithAnotherModeIsReplaced(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "k8slan"), []byte("plugin"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := install(t, "plugin", dir); err != nil {
		t.Fatal(err)
	}
	wantInstalled(t, dir, "plugin")
}

func TestFilesOfAKilledInstallerAreRemoved(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, ".k8slan-new-123"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := install(t, "plugin", dir); err != nil {
		t.Fatal(err)
	}
	wantInstalled(t, dir, "plugin")
}

func TestAFailedInstallationNamesTheTargetAndLeavesNothing(t *testing.T) {
	parent := t.TempDir()
	_, err := install(t, "plugin", filepath.Join(parent, "missing"))
	if err == nil || !strings.Contains(err.Error(), filepath.Join(parent, "missing", "k8slan")) {
		t.Errorf("err = %v, want one that names the target", err)
	}
	if entries, err := os.ReadDir(parent); err != nil || len(entries) != 0 {
		t.Errorf("remaining files %v, %v", entries, err)
	}
}

func TestThePluginsSecondNameIsInstalledAndRemoved(t *testing.T) {
	dir, source := t.TempDir(), filepath.Join(t.TempDir(), "k8slan-cni")
	write := func(path, content string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	has := func(when string, want ...string) {
		t.Helper()
		entries, err := os.ReadDir(dir)
		var have []string
		for _, e := range entries {
			have = append(have, e.Name())
		}
		if err != nil || !slices.Equal(have, want) {
			t.Errorf("%s: the directory has %v, %v; want %v", when, have, err, want)
		}
	}
	write(source, "plugin")
	for _, step := range []struct {
		when    string
		content string
		megalos bool
		want    []string
	}{
		{"both", "plugin", true, []string{"k8slan", "megalos"}},
		{"both, a new one", "plugin 2", true, []string{"k8slan", "megalos"}},
		{"one, and a new one", "plugin 3", false, []string{"k8slan"}},
		{"one", "plugin 3", false, []string{"k8slan"}},
	} {
		write(source, step.content)
		if _, err := installPlugin(source, dir, step.megalos); err != nil {
			t.Fatal(err)
		}
		has(step.when, step.want...)
	}
	write(filepath.Join(dir, "megalos"), "Megalos' own plugin")
	if _, err := installPlugin(source, dir, false); err != nil {
		t.Fatal(err)
	}
	has("another program", "k8slan", "megalos")
}
