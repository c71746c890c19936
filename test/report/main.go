// Command report runs go test and prints each package's summary, each top-level test that passed, all output of the
// tests that failed or were skipped, the ten slowest tests, and how much of its budget the run used.
//
//	report [-core FILE] [-budget DURATION] [-name NAME] [go test's own arguments]
//
// With -core it runs the tests that FILE lists, one a line with the promise that the test shows, and fails if one of
// them does not exist. A budget that is exceeded is reported and is no failure. Where K8SLAN_NO_SKIP is 1, as in CI, a
// skipped test is a failure.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

// options are the flags of report itself.
type options struct {
	core   string
	budget time.Duration
	name   string
}

// parse splits the arguments into those of report and those of go test, which may be mixed.
func parse(args []string) (o options, rest []string, err error) {
	flags := flag.NewFlagSet("report", flag.ContinueOnError)
	flags.StringVar(&o.core, "core", "", "run the tests that this file lists")
	flags.DurationVar(&o.budget, "budget", 0, "how long the run should take at most; 0: no budget")
	flags.StringVar(&o.name, "name", "tests", "what the summary calls this run")
	var own []string
	for i := 0; i < len(args); i++ {
		if name := strings.TrimPrefix(args[i], "-"); name != args[i] && flags.Lookup(name) != nil && i+1 < len(args) {
			own = append(own, args[i], args[i+1])
			i++
			continue
		}
		rest = append(rest, args[i])
	}
	return o, rest, flags.Parse(own)
}

func run(args []string) error {
	o, rest, err := parse(args)
	if err != nil {
		return err
	}
	var core []string
	if o.core != "" {
		text, err := os.ReadFile(o.core)
		if err != nil {
			return fmt.Errorf("read the list of core tests: %w", err)
		}
		core = names(string(text))
		rest = append([]string{"-run", "^(" + strings.Join(core, "|") + ")$"}, rest...)
	}
	cmd := exec.Command("go", append([]string{"test", "-json"}, rest...)...)
	cmd.Stderr = os.Stderr
	events, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("run go test: %w", err)
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("run go test: %w", err)
	}
	result, err := show(os.Stdout, events)
	if err != nil {
		return err
	}
	testErr := cmd.Wait()
	summarize(os.Stdout, o, result, time.Since(began))
	if testErr != nil {
		return fmt.Errorf("go test: %w", testErr)
	}
	if missing := absent(core, result); len(missing) > 0 {
		return fmt.Errorf("%s lists tests that do not exist: %s", o.core, strings.Join(missing, " "))
	}
	if len(result.skipped) > 0 && os.Getenv("K8SLAN_NO_SKIP") == "1" {
		return fmt.Errorf(
			"skipped, and K8SLAN_NO_SKIP requires every test to run: %s",
			strings.Join(result.skipped, " "),
		)
	}
	return nil
}

// names reads the first word of each line; # starts a comment.
func names(list string) (tests []string) {
	for line := range strings.Lines(list) {
		line, _, _ = strings.Cut(line, "#")
		if words := strings.Fields(line); len(words) > 0 {
			tests = append(tests, words[0])
		}
	}
	return tests
}

// absent returns the listed tests that did not run.
func absent(core []string, r result) (missing []string) {
	for _, name := range core {
		if !slices.ContainsFunc(r.ran, func(t test) bool { return t.name == name }) {
			missing = append(missing, name)
		}
	}
	return missing
}

// test is a top-level test that ended.
type test struct {
	name    string
	seconds float64
}

// result is what a run came to.
type result struct {
	ran     []test
	skipped []string // with their packages
}

// event is what go test -json writes, one a line (go doc cmd/test2json).
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64 // seconds
}

// show writes what matters of events to out as it comes.
func show(out io.Writer, events io.Reader) (r result, err error) {
	output := map[string]string{} // by test, while it runs
	lines := bufio.NewReader(events)
	for {
		line, err := lines.ReadString('\n')
		if err == io.EOF {
			return r, nil
		}
		if err != nil {
			return r, fmt.Errorf("read the output of go test: %w", err)
		}
		var e event
		if json.Unmarshal([]byte(line), &e) != nil {
			fmt.Fprint(out, line) // a message of go itself, such as a wrong flag
			continue
		}
		test := e.Package + "." + e.Test
		switch {
		case e.Test == "" && (e.Action == "output" || e.Action == "build-output"):
			if e.Output != "PASS\n" && !strings.HasPrefix(e.Output, "?") { // ?: no test files
				fmt.Fprint(out, e.Output)
			}
		case e.Action == "output":
			output[test] += e.Output
		case e.Test != "" && (e.Action == "pass" || e.Action == "fail" || e.Action == "skip"):
			r.end(out, e, test, output[test])
			delete(output, test)
		}
	}
}

// end records a test that ended, and shows it.
func (r *result) end(out io.Writer, e event, name, output string) {
	top := !strings.Contains(e.Test, "/")
	if top {
		r.ran = append(r.ran, test{e.Test, e.Elapsed})
	}
	switch {
	case e.Action != "pass":
		fmt.Fprint(out, output)
	case top:
		fmt.Fprintf(out, "--- PASS: %s (%.2fs)\n", e.Test, e.Elapsed)
	}
	if e.Action == "skip" {
		r.skipped = append(r.skipped, name)
	}
}

// slowest is how many tests the summary lists, and shortest what it passes over, in seconds.
const (
	slowest  = 10
	shortest = 1
)

// summarize writes the slowest tests and the use of the budget.
func summarize(out io.Writer, o options, r result, took time.Duration) {
	ran := slices.Clone(r.ran)
	slices.SortStableFunc(ran, func(a, b test) int { return cmp.Compare(b.seconds, a.seconds) })
	ran = ran[:min(len(ran), slowest)]
	for i, t := range ran {
		if t.seconds < shortest {
			break
		}
		if i == 0 {
			fmt.Fprintf(out, "slowest of %s, in seconds:\n", o.name)
		}
		fmt.Fprintf(out, "%7.1f  %s\n", t.seconds, t.name)
	}
	took = took.Round(time.Second)
	switch {
	case o.budget == 0:
		fmt.Fprintf(out, "%s: %d tests in %v\n", o.name, len(r.ran), took)
	case took > o.budget:
		fmt.Fprintf(out, "%s: %d tests in %v, OVER the budget of %v\n", o.name, len(r.ran), took, o.budget)
	default:
		fmt.Fprintf(out, "%s: %d tests in %v, %d %% of the budget of %v\n",
			o.name, len(r.ran), took, 100*took/o.budget, o.budget)
	}
}
