package main

import (
	"slices"
	"strings"
	"testing"
)

func TestOnlyWhatPassedIsQuiet(t *testing.T) {
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
	skipped, err := show(&got, strings.NewReader(events))
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != want {
		t.Errorf("showed:\n%swant:\n%s", got.String(), want)
	}
	if !slices.Equal(skipped, []string{"p.TestLazy"}) {
		t.Errorf("skipped %q, want p.TestLazy alone: a package without tests is no skip", skipped)
	}
}
