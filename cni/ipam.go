package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/k8slan/k8slan/lanmgr/kernel"
)

// delegate runs the IPAM plugin with a verb and the unchanged configuration, and returns its output.
// It does not use CNI's own package for this, pkg/invoke, because that links OpenTelemetry and TLS: 2 MB, and a seventh
// of the time of every ADD, with IPAM or without.
func (a attachment) delegate(ctx context.Context, verb string) ([]byte, error) {
	path, err := a.findIPAM()
	if err != nil {
		return nil, err
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(a.config), &stdout, &stderr
	cmd.Env = append(slices.Clip(a.env), "CNI_COMMAND="+verb, "CNI_CONTAINERID="+a.sandbox, "CNI_NETNS="+a.podNetns,
		"CNI_IFNAME="+a.ifname, "CNI_ARGS="+a.arguments, "CNI_PATH="+a.pathList)
	err = cmd.Run()
	if err == nil {
		return stdout.Bytes(), nil
	}
	var cniErr types.Error
	if json.Unmarshal(stdout.Bytes(), &cniErr) == nil && cniErr.Msg != "" {
		return nil, types.NewError(cniErr.Code,
			fmt.Sprintf("%s: IPAM plugin %s: %s", a, a.ipam, cniErr.Msg), cniErr.Details)
	}
	return nil, fail(CodeIPAM, "%s: IPAM plugin %s: %s: %v %s",
		a, a.ipam, verb, err, strings.TrimSpace(stderr.String()))
}

// findIPAM returns the path of the IPAM plugin in CNI_PATH.
func (a attachment) findIPAM() (string, error) {
	for _, dir := range filepath.SplitList(a.pathList) {
		path := filepath.Join(dir, a.ipam)
		info, err := os.Stat(path)
		if err == nil && info.Mode().IsRegular() {
			return path, nil
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", fail(CodeIPAM, "%s: IPAM plugin %s: %v", a, a.ipam, err)
		}
	}
	return "", fail(CodeIPAM,
		"%s: no IPAM plugin %q in %s of this node: install it there, or change ipam.type", a, a.ipam, a.pathList)
}

// allocate lets the IPAM plugin allocate the addresses of the attachment.
func (a attachment) allocate(ctx context.Context) (*current.Result, error) {
	answer, err := a.delegate(ctx, "ADD")
	if err != nil {
		return nil, err
	}
	result, err := a.parseResult(answer)
	if err != nil {
		return nil, fail(CodeIPAM, "%s: IPAM plugin %s: its answer cannot be read: %v", a, a.ipam, err)
	}
	if len(result.IPs) == 0 {
		return nil, fail(CodeIPAM, "%s: IPAM plugin %s gave no address", a, a.ipam)
	}
	return result, nil
}

// parseResult reads a CNI result. A result without a version has that of the configuration.
func (a attachment) parseResult(data []byte) (*current.Result, error) {
	var head struct {
		CNIVersion              string
		Interfaces, IPs, Routes []*json.RawMessage
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, err
	}
	data = bytes.TrimSpace(data)
	if data[0] != '{' {
		return nil, fmt.Errorf("it is %s", data)
	}
	// The library panics on a null element when it converts between versions.
	if slices.Contains(slices.Concat(head.Interfaces, head.IPs, head.Routes), nil) {
		return nil, errors.New("an interface, address or route is null")
	}
	if head.CNIVersion == "" {
		head.CNIVersion = a.version
		comma := ","
		if len(bytes.TrimSpace(data[1:len(data)-1])) == 0 {
			comma = ""
		}
		data = fmt.Appendf(data[:len(data)-1:len(data)-1], "%s%q:%q}", comma, "cniVersion", a.version)
	}
	result, err := create.Create(head.CNIVersion, data)
	if err != nil {
		return nil, err
	}
	return current.NewResultFromResult(result)
}

// addressingOf returns the addresses and routes that an IPAM result has for the pod's interface. A route without a
// gateway gets the first gateway of its family, as in the reference plugins.
func addressingOf(result *current.Result) (kernel.Addressing, error) {
	var want kernel.Addressing
	gateways := map[bool]netip.Addr{} // the key is true for IPv4
	for _, ip := range result.IPs {
		prefix, err := toPrefix(ip.Address)
		if err != nil {
			return want, err
		}
		want.Addresses = append(want.Addresses, prefix)
		gateway, _ := netip.AddrFromSlice(ip.Gateway)
		gateway = gateway.Unmap()
		if _, known := gateways[gateway.Is4()]; gateway.IsValid() && !known {
			gateways[gateway.Is4()] = gateway
		}
	}
	for _, r := range result.Routes {
		prefix, err := toPrefix(r.Dst)
		if err != nil {
			return want, err
		}
		gateway, _ := netip.AddrFromSlice(r.GW)
		if gateway = gateway.Unmap(); !gateway.IsValid() {
			gateway = gateways[prefix.Addr().Is4()]
		}
		want.Routes = append(want.Routes, kernel.Route{
			Destination: prefix.Masked(), Gateway: gateway,
			MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority, Table: r.Table, Scope: r.Scope,
		})
	}
	return want, nil
}

func toPrefix(n net.IPNet) (netip.Prefix, error) {
	addr, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if addr = addr.Unmap(); !ok || bits != addr.BitLen() {
		return netip.Prefix{}, fmt.Errorf("%q is no address with a prefix length", n.String())
	}
	return netip.PrefixFrom(addr, ones), nil
}
