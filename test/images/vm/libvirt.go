package main

import (
	"bytes"
	"context"
	_ "embed" // for the domain
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"text/template"
	"time"
)

// Where the image has libvirt, and where that has its files: by the variables
// XDG_RUNTIME_DIR and XDG_CONFIG_HOME as virt-controller sets them.
const (
	libvirtd      = "/usr/sbin/libvirtd"
	virsh         = "/usr/bin/virsh"
	libvirtSocket = "/var/run/libvirt/libvirt-sock"
	privateDir    = "/var/run/kubevirt-private"
	domainName    = "vm"
)

//go:embed domain.xml
var domainXML string

// domain fills in the domain that libvirt is to run on the macvtap.
func (m machine) domain(link *net.Interface) ([]byte, error) {
	var xml bytes.Buffer
	err := template.Must(
		template.New("domain").Option("missingkey=error").Parse(domainXML),
	).Execute(
		&xml,
		map[string]any{
			"Queues": m.Queues, "Kernel": kernel, "Initramfs": initramfs, "CommandLine": m.commandLine(), "QEMU": qemu,
			"MAC": link.HardwareAddr, "Interface": link.Name, "MTU": link.MTU,
			"Console": filepath.Join(privateDir, "console"), "CommandsBackend": commandsBackend,
		},
	)
	return xml.Bytes(), err
}

// launch runs the VM through libvirt until ctx ends. Should the VM end before,
// libvirt can still be asked. What the guest says goes to out.
func (m machine) launch(ctx context.Context, link *net.Interface, out io.Writer) error {
	daemon, gone, err := startLibvirt(ctx, out)
	if err != nil {
		return err
	}
	defer func() {
		_ = daemon.Signal(os.Interrupt) // it may have ended
		<-gone
	}()
	xml, err := m.domain(link)
	if err != nil {
		return fmt.Errorf("describe the domain: %w", err)
	}
	file := filepath.Join(privateDir, "domain.xml")
	if err := os.WriteFile(file, xml, 0o600); err != nil {
		return fmt.Errorf("describe the domain: %w", err)
	}
	for _, args := range [][]string{{"define", file}, {"start", domainName}} {
		if err := runVirsh(ctx, out, args...); err != nil {
			return err
		}
	}
	console, err := net.Dial("unix", filepath.Join(privateDir, "console"))
	if err != nil {
		return fmt.Errorf("open the console: %w", err)
	}
	ended := make(chan struct{})
	go func() { // ends with QEMU
		defer close(ended)
		if _, err := io.Copy(out, console); err != nil {
			fmt.Fprintln(out, "vm: read the console:", err)
		}
		console.Close()
		fmt.Fprintln(out, "vm: the VM has ended")
	}()
	<-ctx.Done()
	select {
	case <-ended:
		return nil
	default:
		return runVirsh(context.WithoutCancel(ctx), out, "destroy", domainName)
	}
}

// startLibvirt starts libvirtd for this user's session and returns once it
// takes connections. The channel is closed when it has ended.
func startLibvirt(ctx context.Context, out io.Writer) (*os.Process, <-chan struct{}, error) {
	cmd := exec.Command(libvirtd)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		return nil, nil, fmt.Errorf("start libvirtd: %w", err)
	}
	ended := make(chan struct{})
	go func() { // ends with libvirtd
		defer close(ended)
		if err := cmd.Wait(); err != nil {
			fmt.Fprintln(out, "vm: libvirtd:", err)
		}
	}()
	// Nothing announces that it listens: its socket's file is there before.
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		conn, err := net.Dial("unix", libvirtSocket)
		if err == nil {
			return cmd.Process, ended, conn.Close()
		}
		select {
		case <-again.C:
		case <-ended:
			return nil, nil, errors.New("libvirtd ended before it took connections")
		case <-ctx.Done():
			return nil, nil, errors.Join(ctx.Err(), cmd.Process.Kill())
		}
	}
}

func runVirsh(ctx context.Context, out io.Writer, args ...string) error {
	cmd := exec.CommandContext(ctx, virsh, args...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("virsh %q: %w", args, err)
	}
	return nil
}
