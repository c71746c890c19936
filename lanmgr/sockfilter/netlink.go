package sockfilter

import (
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Where fields of struct ndmsg are in a message (include/uapi/linux/neighbour.h), and how much of a message passes.
const (
	ndmFamily     = unix.SizeofNlMsghdr
	ndmFlags      = unix.SizeofNlMsghdr + 10
	ndmAttributes = unix.SizeofNlMsghdr + 12
	wholeMessage  = 1 << 18
)

// Remotes passes events of a VXLAN's remotes: entries of a bridge's or VXLAN's FDB (AF_BRIDGE) with the zero MAC. Other
// changes of neighbours, in every namespace, wake no program.
func Remotes() []bpf.RawInstruction {
	const header = unix.SizeofRtAttr
	return assemble(
		bpf.LoadAbsolute{Off: ndmFamily, Size: 1},
		jumpIf{bpf.JumpNotEqual, unix.AF_BRIDGE, drop},
		bpf.LoadConstant{Dst: bpf.RegA, Val: ndmAttributes},
		bpf.LoadConstant{Dst: bpf.RegX, Val: unix.NDA_LLADDR},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttr}, // where the attribute is; 0: nowhere
		jumpIf{bpf.JumpEqual, 0, drop},
		bpf.TAX{},
		bpf.LoadIndirect{Off: header, Size: 4},
		jumpIf{bpf.JumpNotEqual, 0, drop},
		bpf.LoadIndirect{Off: header + 4, Size: 2},
		jumpIf{bpf.JumpNotEqual, 0, drop},
		bpf.RetConstant{Val: wholeMessage},
	)
}

// BridgeFDB passes events of bridges' FDBs, without those of VXLANs' own.
func BridgeFDB() []bpf.RawInstruction {
	return assemble(
		bpf.LoadAbsolute{Off: ndmFamily, Size: 1},
		jumpIf{bpf.JumpNotEqual, unix.AF_BRIDGE, drop},
		bpf.LoadAbsolute{Off: ndmFlags, Size: 1},
		jumpIf{bpf.JumpBitsSet, unix.NTF_SELF, drop},
		bpf.RetConstant{Val: wholeMessage},
	)
}
