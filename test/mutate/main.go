// Command mutate changes a package in small ways and counts how many of the changes its tests notice.
//
//	mutate [-files REGEXP] [-run REGEXP] [-v] PACKAGE
//
// All mutants of a package are compiled into one test binary, each behind a switch, so that a mutant costs one run of
// the tests and no compilation. A mutant is a comparison, a logical or an arithmetic operator that is another, a
// condition or a returned truth value that is negated, or a statement that is left out.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/tools/go/packages"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(1)
	}
}

func run() error {
	files := flag.String("files", "", "mutate only the files whose names match")
	tests := flag.String("run", "", "run only the tests whose names match")
	verbose := flag.Bool("v", false, "show mutants that the tests noticed, too")
	flag.Parse()
	if flag.NArg() != 1 {
		return errors.New("give one package, such as ./lanmgr/segment")
	}
	named, err := regexp.Compile(*files)
	if err != nil {
		return fmt.Errorf("read -files: %w", err)
	}
	dir, err := os.MkdirTemp("", "mutate-*")
	if err != nil {
		return fmt.Errorf("make a directory to build in: %w", err)
	}
	defer os.RemoveAll(dir)
	p, mutants, err := instrument(flag.Arg(0), dir, named)
	if err != nil {
		return err
	}
	t, err := compile(p, dir, *tests)
	if err != nil {
		return err
	}
	if err := t.measure(mutants); err != nil {
		return err
	}
	t.runAll(mutants)
	return show(os.Stdout, p.PkgPath, mutants, *verbose)
}

// Environment variables between this program and the instrumented package.
const (
	activeEnv  = "K8SLAN_MUTANT"         // number of the mutant that is switched on
	reachedEnv = "K8SLAN_MUTANT_REACHED" // file to which each mutant that is reached appends its number
)

// switchSource is the file that is added to the package.
const switchSource = `package %s

import (
	"os"
	"strconv"
	"sync"
)

var (
	mutantActive, _  = strconv.Atoi(os.Getenv(%q))
	mutantReached, _ = os.OpenFile(os.Getenv(%q), os.O_APPEND|os.O_WRONLY, 0)
	mutantOnce       sync.Map
)

func mutant(id int) bool {
	if mutantReached != nil {
		if _, again := mutantOnce.LoadOrStore(id, true); !again {
			_, _ = mutantReached.WriteString(strconv.Itoa(id) + "\n")
		}
	}
	return id == mutantActive
}
`

// instrument writes the mutated files and an overlay for go build to dir.
func instrument(pattern, dir string, named *regexp.Regexp) (*packages.Package, []*mutation, error) {
	loaded, err := packages.Load(&packages.Config{Mode: packages.LoadSyntax}, pattern)
	if err != nil {
		return nil, nil, fmt.Errorf("load %s: %w", pattern, err)
	}
	if len(loaded) != 1 || len(loaded[0].Errors) > 0 {
		return nil, nil, fmt.Errorf("load %s: not one package that compiles: %v", pattern, loaded)
	}
	p := loaded[0]
	overlay := map[string]string{}
	var all []*mutation
	for i, path := range p.CompiledGoFiles {
		if !named.MatchString(filepath.Base(path)) || strings.HasPrefix(filepath.Base(path), "zz_") {
			continue
		}
		src, err := os.ReadFile(path)
		if err != nil {
			return nil, nil, fmt.Errorf("read a file to mutate: %w", err)
		}
		text, found := mutate(p, p.Syntax[i], src, len(all)+1)
		if len(found) == 0 {
			continue
		}
		all = append(all, found...)
		overlay[path] = filepath.Join(dir, filepath.Base(path))
		if err := os.WriteFile(overlay[path], text, 0o600); err != nil {
			return nil, nil, fmt.Errorf("write a mutated file: %w", err)
		}
	}
	if len(all) == 0 {
		return nil, nil, fmt.Errorf("%s has nothing to mutate in files that match %q", pattern, named)
	}
	added := filepath.Join(filepath.Dir(p.CompiledGoFiles[0]), "zz_mutant.go")
	overlay[added] = filepath.Join(dir, "zz_mutant.go")
	text := fmt.Sprintf(switchSource, p.Name, activeEnv, reachedEnv)
	if err := os.WriteFile(overlay[added], []byte(text), 0o600); err != nil {
		return nil, nil, fmt.Errorf("write the file with the switch: %w", err)
	}
	list, err := json.Marshal(map[string]any{"Replace": overlay})
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "overlay.json"), list, 0o600)
	}
	return p, all, err
}

// tests is a test binary with all mutants.
type tests struct {
	binary, dir, run string
	reached          string // file with the numbers of mutants
	limit            time.Duration
}

func compile(p *packages.Package, dir, run string) (*tests, error) {
	t := &tests{
		binary: filepath.Join(dir, "mutants.test"), dir: filepath.Dir(p.CompiledGoFiles[0]), run: run,
		reached: filepath.Join(dir, "reached"),
	}
	cmd := exec.Command(
		"go",
		"test",
		"-c",
		"-vet=off",
		"-overlay",
		filepath.Join(dir, "overlay.json"),
		"-o",
		t.binary,
		p.PkgPath,
	)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compile the mutants of %s: %w\n%s", p.PkgPath, err, out)
	}
	return t, nil
}

// measure runs the tests without a mutant, to know which are reached and how long the tests take.
func (t *tests) measure(mutants []*mutation) error {
	if err := os.WriteFile(t.reached, nil, 0o600); err != nil {
		return fmt.Errorf("make the file for the mutants that are reached: %w", err)
	}
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	if out, err := t.once(ctx, reachedEnv+"="+t.reached); err != nil {
		return fmt.Errorf("the tests fail without a mutant: %w\n%s", err, out)
	}
	t.limit = 5*time.Since(began) + 5*time.Second
	text, err := os.ReadFile(t.reached)
	if err != nil {
		return fmt.Errorf("read which mutants were reached: %w", err)
	}
	for _, word := range strings.Fields(string(text)) {
		if id, err := strconv.Atoi(word); err == nil {
			mutants[id-1].reached = true
		}
	}
	return nil
}

// once runs the tests with one more environment variable.
func (t *tests) once(ctx context.Context, env string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, t.binary, "-test.failfast", "-test.run", t.run)
	cmd.Dir, cmd.Env = t.dir, append(os.Environ(), env)
	return cmd.CombinedOutput()
}

// runAll runs the tests for each mutant that they reach, on all processors.
func (t *tests) runAll(mutants []*mutation) {
	todo := make(chan *mutation)
	var workers sync.WaitGroup
	for range runtime.NumCPU() {
		workers.Go(func() {
			for m := range todo {
				ctx, cancel := context.WithTimeout(context.Background(), t.limit)
				_, err := t.once(ctx, fmt.Sprintf("%s=%d", activeEnv, m.id))
				m.killed = err != nil // a run that does not end counts
				cancel()
			}
		})
	}
	for _, m := range mutants {
		if m.reached {
			todo <- m
		}
	}
	close(todo)
	workers.Wait()
}

func show(out io.Writer, pkg string, mutants []*mutation, verbose bool) error {
	var text bytes.Buffer
	killed := 0
	for _, m := range mutants {
		verdict := "survived"
		switch {
		case m.killed:
			verdict = "killed"
			killed++
		case !m.reached:
			verdict = "not reached"
		}
		if !m.killed || verbose {
			fmt.Fprintf(&text, "%-11s %s:%d: %s\n", verdict, m.file, m.line, m.what)
		}
	}
	survivors := slices.DeleteFunc(slices.Clone(mutants), func(m *mutation) bool { return m.killed })
	fmt.Fprintf(&text, "%s: %d of %d mutants killed, %d %%; %d left\n",
		pkg, killed, len(mutants), 100*killed/len(mutants), len(survivors))
	_, err := out.Write(text.Bytes())
	return err
}
