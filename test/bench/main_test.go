package bench

import (
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"

	"github.com/go-logr/logr"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/k8slan/k8slan/test/netlab"
)

// long selects the measurement of docs/performance.md; without it the tests only show that everything can be measured.
var long = flag.Bool("long", false, "measure for about ten minutes instead of a moment")

// output is the file for the results.
var output = flag.String("json", "", "`file` for the results")

func TestMain(m *testing.M) {
	if os.Getenv(spokesRole) != "" {
		os.Exit(advertiseSpokes(os.Stdin, os.Stdout))
	}
	if at := os.Getenv(bareSpeaker); at != "" {
		os.Exit(runBareSpeaker(at))
	}
	ctrllog.SetLogger(logr.Discard()) // otherwise the library warns that it has no logger
	netlab.Main(m)
}

// TestPerformance measures everything. It fails if something cannot be measured; it reports a target that is missed.
func TestPerformance(t *testing.T) {
	netlab.NeedRoot(t, "a kubelet needs root")
	b := &bench{}
	t.Cleanup(func() { // after the measurements, also those that run side by side
		b.print()
		if *output != "" {
			b.write(t)
		}
	})
	for _, m := range []struct {
		name    string
		measure func(*testing.T, *bench)
		waits   bool // for timers, most of the time
	}{
		{"B1-B2", addTime, false},
		{"B3", attachRate, false},
		{"B4", removalStall, false},
		{"B5-B6", coldAndIdle, false},
		{"B7", kubeletCost, false},
		{"B8", traffic, false},
		{"B9-B10", unicast, true},
		{"B9-flood", flooding, false},
		{"B11", evpn, true},
		{"B12", sidecar, false},
	} {
		t.Run(m.name, func(t *testing.T) {
			if m.waits && !*long { // a smoke test may be disturbed
				t.Parallel()
			}
			m.measure(t, b)
		})
	}
}

// bench collects results.
type bench struct {
	mu      sync.Mutex
	results []result
}

// result is one line of the table. Value and Target are numbers or text.
type result struct {
	ID     string `json:"id"`
	What   string `json:"what"`
	Value  any    `json:"value"`
	Target string `json:"target"`
	Met    bool   `json:"met"`

	figures string // where the value comes from, for readers
}

func (b *bench) add(r result) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.results = append(b.results, r)
	fmt.Printf("%s %s: %v, wanted %s; %s\n", r.ID, r.What, r.Value, r.Target, r.figures)
}

// atMost and atLeast add a result whose target is a number.
func (b *bench) atMost(id, what string, value, target float64, figures string) {
	value = round(value)
	b.add(result{
		ID: id, What: what, Value: value, Target: fmt.Sprintf("≤ %v", target), Met: value <= target, figures: figures,
	})
}

func (b *bench) atLeast(id, what string, value, target float64, figures string) {
	value = round(value)
	b.add(result{
		ID: id, What: what, Value: value, Target: fmt.Sprintf("≥ %v", target), Met: value >= target, figures: figures,
	})
}

// round keeps three significant digits.
func round(v float64) float64 {
	if v == 0 {
		return 0
	}
	unit := math.Pow(10, 2-math.Floor(math.Log10(math.Abs(v))))
	return math.Round(v*unit) / unit
}

func (b *bench) print() {
	fmt.Println()
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "id\twhat\tvalue\ttarget\tmet\tfrom")
	for _, r := range b.results {
		met := "yes"
		if !r.Met {
			met = "NO"
		}
		fmt.Fprintf(table, "%s\t%s\t%v\t%s\t%s\t%s\n", r.ID, r.What, r.Value, r.Target, met, r.figures)
	}
	_ = table.Flush() // to standard output
}

func (b *bench) write(t *testing.T) {
	t.Helper()
	var text strings.Builder
	encoder := json.NewEncoder(&text)
	encoder.SetIndent("", "  ")
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(b.results); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(*output, []byte(text.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

// times returns how often something is repeated: often with -long, else as often as a smoke test needs.
func times(often, smoke int) int {
	if *long {
		return often
	}
	return smoke
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
