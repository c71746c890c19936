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
	CodeIPAM                          // the IPAM plugin could not be run, or its result cannot be used
	CodeChanged                       // CHECK: the attachment differs from what ADD made
	CodeCDI                           // the CDI file could not be written or removed
	CodeNoOrdinal                     // the pool derives MACs from ordinals, and the pod has none
)

// Reason returns the reason under which the daemon counts an error of the plugin.
func Reason(err error) report.Reason {
	cniErr, ok := errors.AsType[*types.Error](err)
	if !ok {
		return report.Other
	}
	switch cniErr.Code {
	case types.ErrIncompatibleCNIVersion, types.ErrInvalidEnvironmentVariables, types.ErrDecodingFailure,
		types.ErrInvalidNetworkConfig, CodeNoOrdinal:
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

// fail returns a CNI error with a code and a sentence.
func fail(code uint, format string, args ...any) error {
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}

// explain returns the CNI error for an error of the node; its sentence says what to do.
func (a attachment) explain(err error) error {
	if cniErr, ok := errors.AsType[*types.Error](err); ok { // from admit
		return cniErr
	}
	switch {
	case errors.Is(err, kernel.ErrNoLAN):
		return a.noLAN(types.ErrTryAgainLater)
	case errors.Is(err, kernel.ErrNoSpoke):
		return a.noSpoke(CodeNoSpoke)
	case errors.Is(err, segment.ErrNoOrdinal):
		return fail(CodeNoOrdinal,
			"%s: %v; attach the pods of a StatefulSet, or remove macBy: ordinal from the pool", a, err)
	case errors.Is(err, kernel.ErrNameTaken):
		return fail(CodeNameTaken,
			"%s: the pod already has an interface %q; request another name, as in %s@<name>", a, a.ifname, a.network)
	case errors.Is(err, kernel.ErrSameSandbox):
		return fail(CodeSameSandbox, "%s is already attached to this pod, and a spoke has one interface: "+
			"add another spoke to the LAN for the second", a)
	case errors.Is(err, fs.ErrNotExist):
		return fail(types.ErrInvalidNetNS, "%s: %v", a, err)
	case errors.Is(err, context.DeadlineExceeded):
		return fail(types.ErrTryAgainLater, "%s: the node is busy with this LAN: %v", a, err)
	}
	return fail(CodeAttach, "%s: %v", a, err)
}

// noLAN is the error for a LAN that is not on this node.
func (a attachment) noLAN(code uint) error {
	if a.vni != 0 {
		return fail(code, "%s is not on this node any more (no %s)", a, a.netnsPath)
	}
	return fail(code, "LAN %s is not on this node (no %s): was it deleted, or is the daemon still starting? "+
		"See kubectl get lan -n %s %s", a.lan, a.netnsPath, a.lan.Namespace, a.lan.Name)
}

// noSpoke is the error for a spoke or port that the LAN does not have on this node.
func (a attachment) noSpoke(code uint) error {
	if a.pool != "" {
		return fail(code, "LAN %s has no pool %q with a port %q on this node: is it in spec.spokePools, not refused, "+
			"and not made smaller? See kubectl describe lan -n %s %s",
			a.lan, a.pool, a.spoke, a.lan.Namespace, a.lan.Name)
	}
	return fail(code, "LAN %s has no spoke %q on this node: is it in spec.spokes, and not refused? "+
		"See kubectl describe lan -n %s %s", a.lan, a.spoke, a.lan.Namespace, a.lan.Name)
}

// undo is a stack of steps that undo what was done.
type undo []func(context.Context) error

// run runs the steps, the last first, and adds their errors to err.
func (u undo) run(ctx context.Context, err error) error {
	var failed []error
	for i := len(u) - 1; i >= 0; i-- {
		failed = append(failed, u[i](ctx))
	}
	rest := errors.Join(failed...)
	if rest == nil {
		return err
	}
	code := CodeAttach
	if e, ok := errors.AsType[*types.Error](err); ok {
		code = e.Code
	}
	return types.NewError(code, err.Error(), "and could not be undone: "+rest.Error())
}
