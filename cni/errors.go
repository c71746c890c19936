package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/k8slan/k8slan/cni/report"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// The plugin's own error codes; those below 100 are the CNI specification's
// (https://www.cni.dev/docs/spec/#error): 1 version, 4 environment, 6 JSON, 7 configuration, 8 network namespace,
// 11 try again, 50 not available, 51 limited connectivity.
const (
	CodeNoDevice    uint = 100 + iota // kubelet allocated no device of the spoke to this pod
	CodeWrongDevice                   // kubelet allocated another spoke's device
	CodeForbidden                     // the LAN is not open to the pod's namespace
	CodeNoSpoke                       // the LAN has no such spoke on this node
	CodeNameTaken                     // the pod already has an interface of that name
	CodeSameSandbox                   // the pod already has this spoke under another interface name
	CodeAttach                        // the kernel refused a step of the attachment
	CodeIPAM                          // the IPAM plugin could not be run, or gave an answer that cannot be used
	CodeChanged                       // CHECK: the attachment is not any more what ADD made
	CodeCDI                           // the CDI file could not be written or removed
	CodeNoOrdinal                     // the pool derives MACs from ordinals, and the pod has none
)

// Reason is what an error of the plugin is counted as.
func Reason(err error) report.Reason {
	said, ok := errors.AsType[*types.Error](err)
	if !ok {
		return report.Other
	}
	switch said.Code {
	case types.ErrIncompatibleCNIVersion, types.ErrInvalidEnvironmentVariables, types.ErrDecodingFailure, types.ErrInvalidNetworkConfig, CodeNoOrdinal:
		return report.Configuration
	case types.ErrInvalidNetNS:
		return report.Netns
	case types.ErrTryAgainLater:
		return report.Unavailable
	case CodeNoDevice:
		return report.NoDevice
	case CodeWrongDevice:
		return report.WrongDevice
	case CodeForbidden:
		return report.Forbidden
	case CodeNoSpoke:
		return report.NoSpoke
	case CodeNameTaken:
		return report.NameTaken
	case CodeSameSandbox:
		return report.SameSandbox
	case types.ErrIOFailure, CodeAttach:
		return report.Kernel
	case CodeIPAM:
		return report.IPAM
	case CodeCDI:
		return report.CDI
	}
	return report.Other
}

// fail is a CNI error with a sentence.
func fail(code uint, format string, args ...any) error {
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}

// explain turns an error of the node into a CNI error whose sentence says what to do.
func (a attachment) explain(err error) error {
	if said, ok := errors.AsType[*types.Error](err); ok { // it is one: the spoke was refused
		return said
	}
	switch {
	case errors.Is(err, kernel.ErrNoLAN):
		return a.noLAN(types.ErrTryAgainLater)
	case errors.Is(err, kernel.ErrNoSpoke):
		return a.noSpoke(CodeNoSpoke)
	case errors.Is(err, segment.ErrNoOrdinal):
		return fail(CodeNoOrdinal, "%s: %v; attach the pods of a StatefulSet, or take macBy: ordinal out of the pool", a, err)
	case errors.Is(err, kernel.ErrNameTaken):
		return fail(CodeNameTaken, "%s: the pod already has an interface %q; ask for another name, as in %s@<name>", a, a.ifname, a.network)
	case errors.Is(err, kernel.ErrSameSandbox):
		return fail(CodeSameSandbox, "%s is already attached to this pod; a spoke takes one interface: add another spoke to the LAN for the second", a)
	case errors.Is(err, fs.ErrNotExist):
		return fail(types.ErrInvalidNetNS, "%s: %v", a, err)
	case errors.Is(err, context.DeadlineExceeded):
		return fail(types.ErrTryAgainLater, "%s: the node is busy with this LAN: %v", a, err)
	}
	return fail(CodeAttach, "%s: %v", a, err)
}

func (a attachment) noLAN(code uint) error {
	if a.vni != 0 {
		return fail(code, "%s is not on this node any more (no %s)", a, a.netnsPath)
	}
	return fail(code, "LAN %s is not on this node (no %s): was it deleted, or is the daemon still starting? kubectl get lan -n %s %s",
		a.lan, a.netnsPath, a.lan.Namespace, a.lan.Name)
}

func (a attachment) noSpoke(code uint) error {
	if a.pool != "" {
		return fail(code, "LAN %s has no pool %q with a port %q on this node: is it in spec.spokePools, not refused, and not made smaller? kubectl describe lan -n %s %s",
			a.lan, a.pool, a.spoke, a.lan.Namespace, a.lan.Name)
	}
	return fail(code, "LAN %s has no spoke %q on this node: is it in spec.spokes, and not refused? kubectl describe lan -n %s %s",
		a.lan, a.spoke, a.lan.Namespace, a.lan.Name)
}

// undo is what takes back the steps that were done, the last first.
type undo []func(context.Context) error

// run takes everything back and adds to err what could not be.
func (u undo) run(ctx context.Context, err error) error {
	var left []error
	for i := len(u) - 1; i >= 0; i-- {
		left = append(left, u[i](ctx))
	}
	rest := errors.Join(left...)
	if rest == nil {
		return err
	}
	code := CodeAttach
	if e, ok := errors.AsType[*types.Error](err); ok {
		code = e.Code
	}
	return types.NewError(code, err.Error(), "and could not be undone: "+rest.Error())
}
