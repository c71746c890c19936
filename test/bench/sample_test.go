package bench

import (
	"fmt"
	"slices"
	"testing"
)

// contender is one of several ways to do the same. Each call of once does it once, and returns its cost or its yield.
type contender struct {
	name string
	once func() (float64, error)
}

// samples are a contender's results, one per round.
type samples []float64

// race calls all contenders once per round, each round beginning with another one, so that what slows the machine down
// slows all of them. The first round warms up and doesn't count.
func race(t *testing.T, rounds int, contenders ...contender) map[string]samples {
	t.Helper()
	all := map[string]samples{}
	for round := range rounds + 1 {
		for i := range contenders {
			c := contenders[(i+round)%len(contenders)]
			v, err := c.once()
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			if round > 0 {
				all[c.name] = append(all[c.name], v)
			}
		}
	}
	return all
}

// over returns the ratios to another contender's results, round by round.
func (s samples) over(o samples) samples {
	ratios := make(samples, len(s))
	for i := range s {
		ratios[i] = s[i] / o[i]
	}
	return ratios
}

// quantile returns the value below which that part of the samples lies.
func (s samples) quantile(q float64) float64 {
	sorted := slices.Sorted(slices.Values(s))
	at := q * float64(len(sorted)-1)
	low := int(at)
	high := min(low+1, len(sorted)-1)
	return sorted[low] + (sorted[high]-sorted[low])*(at-float64(low))
}

func (s samples) median() float64 { return s.quantile(0.5) }

// spread returns the limits of the middle half of the samples.
func (s samples) spread() string {
	return fmt.Sprintf("%v–%v", round(s.quantile(0.25)), round(s.quantile(0.75)))
}

// figures returns the medians of a ratio, and its spread over the rounds. The best tenth of the rounds is an estimate
// for a machine without other load.
func figures(unit string, ours, theirs samples) string {
	best := 0.1
	if unit == "per s" {
		best = 0.9
	}
	return fmt.Sprintf("%v / %v %s, middle half %s, best tenth %v / %v %s, %d rounds",
		round(ours.median()), round(theirs.median()), unit,
		ours.over(theirs).spread(), round(ours.quantile(best)), round(theirs.quantile(best)), unit, len(ours))
}
