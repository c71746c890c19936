// Package sockfilter has the socket filters of k8slan: programs that the kernel runs before it copies a packet to a
// socket.
package sockfilter

import (
	"fmt"
	"slices"

	"golang.org/x/net/bpf"
)

// label names the instruction that follows it in a program.
type label string

// jumpIf continues at then if the accumulator compares so with value, and with the next instruction otherwise.
type jumpIf struct {
	cond  bpf.JumpTest
	value uint32
	then  label
}

// drop is the label of the place where a program drops the packet: its end, unless it has the label itself.
const drop label = "drop"

// Assemble fails: a label has no instruction of its own.
func (l label) Assemble() (bpf.RawInstruction, error) {
	return bpf.RawInstruction{}, fmt.Errorf("label %q was not resolved", string(l))
}

// Assemble fails: the distance to the label is not known yet.
func (j jumpIf) Assemble() (bpf.RawInstruction, error) {
	return bpf.RawInstruction{}, fmt.Errorf("jump to label %q was not resolved", string(j.then))
}

// assemble resolves the labels of a program and assembles it. The programs of this package are constants but for
// numbers, so that an error is a mistake in them.
func assemble(program ...bpf.Instruction) []bpf.RawInstruction {
	if !slices.Contains(program, bpf.Instruction(drop)) {
		program = append(program, drop, bpf.RetConstant{Val: 0})
	}
	at := map[label]int{}
	size := 0
	for _, in := range program {
		if l, ok := in.(label); ok {
			at[l] = size
		} else {
			size++
		}
	}
	resolved := make([]bpf.Instruction, 0, size)
	for _, in := range program {
		switch in := in.(type) {
		case label:
			continue
		case jumpIf:
			there, ok := at[in.then]
			skip := there - len(resolved) - 1
			if !ok || skip < 0 || skip > 255 {
				panic(fmt.Sprintf("no way to jump %d instructions to label %q", skip, string(in.then)))
			}
			resolved = append(resolved, bpf.JumpIf{Cond: in.cond, Val: in.value, SkipTrue: uint8(skip)})
		default:
			resolved = append(resolved, in)
		}
	}
	raw, err := bpf.Assemble(resolved)
	if err != nil {
		panic(err)
	}
	return raw
}
