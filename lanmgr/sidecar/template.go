package sidecar

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// expand replaces {ordinal} and {ordinal+N} by the pod's ordinal, the number at the end of its name. {ordinal:x} and
// {ordinal+N:x} become hexadecimal with at least two digits.
func expand(template, pod string) (string, error) {
	var out strings.Builder
	for rest := template; ; {
		before, after, ok := strings.Cut(rest, "{")
		out.WriteString(before)
		if !ok {
			return out.String(), nil
		}
		expression, tail, ok := strings.Cut(after, "}")
		expression, hex := strings.CutSuffix(expression, ":x")
		added, isOrdinal := parseOrdinal(expression)
		if !ok || !isOrdinal {
			return "", fmt.Errorf("%q: {...} is {ordinal}, {ordinal+1} or, in hexadecimal, {ordinal+1:x}", template)
		}
		ordinal, has := segment.Ordinal(pod)
		if !has {
			return "", fmt.Errorf("%q needs the pod's ordinal, and the pod is called %q", template, pod)
		}
		if hex {
			fmt.Fprintf(&out, "%02x", ordinal+added)
		} else {
			fmt.Fprintf(&out, "%d", ordinal+added)
		}
		rest = tail
	}
}

// parseOrdinal reads ordinal or ordinal+N, and returns N.
func parseOrdinal(expression string) (added int, ok bool) {
	plus, ok := strings.CutPrefix(expression, "ordinal")
	if !ok || plus == "" {
		return 0, ok
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(plus, "+"), 10, 31)
	return int(n), err == nil && plus[0] == '+'
}
