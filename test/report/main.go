// Command report runs go test with its own arguments and shows what a reader
// needs: each package's summary line, each top-level test that passed, and all
// that a failed or skipped test has to say. Where K8SLAN_NO_SKIP is 1, as in
// CI, a skipped test is a failure.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	events, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("run go test: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("run go test: %w", err)
	}
	skipped, err := show(os.Stdout, events)
	if err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("go test: %w", err)
	}
	if len(skipped) > 0 && os.Getenv("K8SLAN_NO_SKIP") == "1" {
		return fmt.Errorf("skipped, and K8SLAN_NO_SKIP wants every test to run: %s", strings.Join(skipped, " "))
	}
	return nil
}

// event is what go test -json writes, one a line (go doc cmd/test2json).
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64 // seconds
}

// show writes what matters of events to out as it comes, and returns the tests
// that were skipped.
func show(out io.Writer, events io.Reader) (skipped []string, err error) {
	said := map[string]string{} // by test, while it runs
	lines := bufio.NewReader(events)
	for {
		line, err := lines.ReadString('\n')
		if err == io.EOF {
			return skipped, nil
		}
		if err != nil {
			return skipped, fmt.Errorf("read what go test says: %w", err)
		}
		var e event
		if json.Unmarshal([]byte(line), &e) != nil {
			fmt.Fprint(out, line) // go's own words, such as a wrong flag
			continue
		}
		test := e.Package + "." + e.Test
		switch {
		case e.Test == "" && (e.Action == "output" || e.Action == "build-output"):
			if e.Output != "PASS\n" && !strings.HasPrefix(e.Output, "?") { // ?: no test files
				fmt.Fprint(out, e.Output)
			}
		case e.Action == "output":
			said[test] += e.Output
		case e.Test != "" && e.Action == "pass":
			if !strings.Contains(e.Test, "/") {
				fmt.Fprintf(out, "--- PASS: %s (%.2fs)\n", e.Test, e.Elapsed)
			}
			delete(said, test)
		case e.Test != "" && (e.Action == "fail" || e.Action == "skip"):
			fmt.Fprint(out, said[test])
			delete(said, test)
			if e.Action == "skip" {
				skipped = append(skipped, test)
			}
		}
	}
}
