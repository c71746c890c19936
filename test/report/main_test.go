package main

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func TestPassedTestsShowNoOutput(t *testing.T) {
	const events = `{"Action":"build-output","ImportPath":"x","Output":"x.go:1: broken\n"}
{"Action":"run","Package":"p","Test":"TestGood"}
{"Action":"output","Package":"p","Test":"TestGood","Output":"    good_test.go:1: chatter\n"}
{"Action":"output","Package":"p","Test":"TestBad/part","Output":"    bad_test.go:2: the reason\n"}
{"Action":"pass","Package":"p","Test":"TestGood","Elapsed":1.5}
{"Action":"fail","Package":"p","Test":"TestBad/part"}
{"Action":"output","Package":"p","Test":"TestLazy","Output":"    lazy_test.go:3: no root\n"}
{"Action":"skip","Package":"p","Test":"TestLazy"}
{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
{"Action":"output","Package":"q","Output":"?   \tq\t[no test files]\n"}
{"Action":"skip","Package":"q"}
flag provided but not defined: -x
`
	const want = `x.go:1: broken
--- PASS: TestGood (1.50s)
    bad_test.go:2: the reason
    lazy_test.go:3: no root
FAIL	p	0.1s
flag provided but not defined: -x
`
	var got strings.Builder
	r, err := show(&got, strings.NewReader(events))
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != want {
		t.Errorf("showed:\n%swant:\n%s", got.String(), want)
	}
	if !slices.Equal(r.skipped, []string{"p.TestLazy"}) {
		t.Errorf("skipped %q, want p.TestLazy alone: a package without tests is no skip", r.skipped)
	}
	if want := []test{{"TestGood", 1.5}, {"TestLazy", 0}}; !slices.Equal(r.ran, want) {
		t.Errorf("ran %v, want %v", r.ran, want)
	}
}

func TestArgumentsOfReportMayStandAmongThoseOfGoTest(t *testing.T) {
	args := []string{"-count", "1", "-core", "core.txt", "-budget", "2m", "-name", "its own", "-run", "", "./x"}
	o, rest, err := parse(args)
	if err != nil {
		t.Fatal(err)
	}
	if want := (options{core: "core.txt", budget: 2 * time.Minute, name: "its own"}); o != want {
		t.Errorf("options are %+v, want %+v", o, want)
	}
	if want := []string{"-count", "1", "-run", "", "./x"}; !slices.Equal(rest, want) {
		t.Errorf("go test gets %q, want %q", rest, want)
	}
}

func TestListedTestMustExist(t *testing.T) {
	core := names("# what the README promises\nTestGood  pods reach each other\n\nTestGone  removed # long ago\n")
	if want := []string{"TestGood", "TestGone"}; !slices.Equal(core, want) {
		t.Fatalf("read %q, want %q", core, want)
	}
	if got := absent(core, result{ran: []test{{"TestGood", 1}}}); !slices.Equal(got, []string{"TestGone"}) {
		t.Errorf("missing are %q, want TestGone alone", got)
	}
}

func TestSummaryHasTheTenSlowestAndTheBudget(t *testing.T) {
	r := result{ran: []test{{"TestQuick", 0.2}}}
	for i := range 11 {
		r.ran = append(r.ran, test{"Test" + string(rune('A'+i)), float64(i + 1)})
	}
	var got strings.Builder
	summarize(&got, options{name: "e2e", budget: time.Minute}, r, 30*time.Second)
	if out := got.String(); strings.Contains(out, "TestA\n") || !strings.Contains(out, "   11.0  TestK\n") ||
		!strings.HasSuffix(out, "e2e: 12 tests in 30s, 50 % of the budget of 1m0s\n") {
		t.Errorf("the summary is:\n%s", out)
	}
	got.Reset()
	summarize(&got, options{name: "e2e", budget: time.Minute}, r, 61*time.Second)
	if !strings.Contains(got.String(), "OVER the budget of 1m0s") {
		t.Errorf("the summary does not report the exceeded budget:\n%s", got.String())
	}
}
