// Command style checks the text of the repository: how often words stand in it that are no terms of the field, and
// that no line is wider than 120 columns.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path"
	"regexp"
	"strings"
	"unicode/utf8"
)

const (
	// most is how often all of the words together may stand in product code, where they have their plain sense.
	most = 40
	// widest is the number of columns of a line, where a tab counts as four.
	widest = 120
)

// dialect are words that docs/glossary.md has better ones for.
var dialect = regexp.MustCompile(
	`(?i)\b(told|tells?|hears?|heard|anew|wish|wishes|wished|nobody|somebody|whoever|strangers?)\b`,
)

// camel finds the places where a word begins inside an identifier.
var camel = regexp.MustCompile(`([a-z0-9])([A-Z])`)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "style:", err)
		os.Exit(1)
	}
}

func run() error {
	all := flag.Bool("all", false, "also list the words outside product code")
	flag.Parse()
	out, err := exec.Command("git", "ls-files", "-z").Output()
	if err != nil {
		return fmt.Errorf("list the repository's files: %w", err)
	}
	var found findings
	for name := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		if !isText(name) {
			continue
		}
		text, err := os.ReadFile(name)
		if os.IsNotExist(err) { // deleted and not committed yet
			continue
		}
		if err != nil {
			return fmt.Errorf("read a file of the repository: %w", err)
		}
		found.add(name, string(text))
	}
	fmt.Printf("style: %d words that are no terms of the field in product code (fewer than %d), %d elsewhere; %d "+
		"wide lines\n",
		len(found.product), most, len(found.elsewhere), len(found.wide))
	var errs []error
	if len(found.product) >= most {
		errs = append(errs, fmt.Errorf("too many words that are no terms of the field; docs/glossary.md has better "+
			"ones:\n%s",
			strings.Join(found.product, "\n")))
	}
	if len(found.wide) > 0 {
		errs = append(errs, fmt.Errorf("lines wider than %d columns:\n%s", widest, strings.Join(found.wide, "\n")))
	}
	if *all {
		fmt.Println(strings.Join(found.elsewhere, "\n"))
	}
	return errors.Join(errs...)
}

// findings are places, each as file:line and the line.
type findings struct {
	product, elsewhere, wide []string
}

// add looks through one file.
func (f *findings) add(name, text string) {
	fenced := false
	for i, line := range strings.Split(text, "\n") {
		place := fmt.Sprintf("%s:%d: %s", name, i+1, strings.TrimSpace(line))
		for range dialect.FindAllString(camel.ReplaceAllString(line, "$1 $2"), -1) {
			if isProduct(name) {
				f.product = append(f.product, place)
			} else {
				f.elsewhere = append(f.elsewhere, place)
			}
		}
		if path.Ext(name) == ".md" && strings.HasPrefix(strings.TrimSpace(line), "```") {
			fenced = !fenced
		}
		if isWide(line) && !mayBeWide(name, line, fenced) {
			f.wide = append(f.wide, place)
		}
	}
}

// isText reports whether a file is written by people.
func isText(name string) bool {
	switch {
	case strings.Contains(name, "/testdata/"),
		strings.Contains(name, "zz_generated"),
		strings.HasPrefix(name, "test/style/"):
		return false
	case strings.HasPrefix(name, "crd/manifests/"), strings.HasPrefix(name, "charts/k8slan/crds/"): // generated
		return path.Ext(name) == ".go"
	}
	switch path.Ext(name) {
	case ".go", ".md", ".yaml", ".yml", ".tpl", ".txt":
		return true
	}
	return path.Base(name) == "Makefile"
}

// isProduct reports whether a file is part of what users run.
func isProduct(name string) bool {
	top, _, _ := strings.Cut(name, "/")
	switch top {
	case "cmd", "cni", "crd", "deviceplugin", "lanmgr", "charts", "build":
		return !strings.HasSuffix(name, "_test.go")
	}
	return false
}

func isWide(line string) bool {
	return utf8.RuneCountInString(strings.ReplaceAll(line, "\t", "    ")) > widest
}

// mayBeWide reports whether a wide line cannot be broken: a marker, a URL, a table or what a command prints.
func mayBeWide(name, line string, fenced bool) bool {
	trimmed := strings.TrimSpace(line)
	if strings.Contains(line, "https://") || strings.Contains(line, "http://") {
		return true
	}
	switch path.Ext(name) {
	case ".md":
		return fenced || strings.HasPrefix(trimmed, "|")
	case ".go":
		return strings.HasPrefix(trimmed, "// +") || strings.HasPrefix(trimmed, "//go:") ||
			strings.HasPrefix(trimmed, "//nolint")
	case ".yaml", ".tpl":
		return strings.Contains(line, "{{") || bytes.ContainsAny([]byte(line), "`") ||
			strings.HasPrefix(trimmed, "expression:") ||
			strings.HasPrefix(trimmed, "messageExpression:")
	}
	return path.Base(name) == "Makefile" && !strings.HasPrefix(trimmed, "#")
}
