package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/test/images/vm/remote"
)

// Where the image has things, and where QEMU's user mode network leads
// commands to the guest.
const (
	qemu      = "/usr/bin/qemu-system-x86_64"
	kernel    = "/guest/vmlinuz"
	initramfs = "/guest/initramfs"
	startFIFO = "/run/vm/start"
	hostPort  = "127.0.0.1:2022"
	guestPort = "10.0.2.15:2022"
)

// commandsBackend is QEMU's side of the NIC that carries commands to the guest.
const commandsBackend = "user,id=commands,ipv6=off,restrict=on,hostfwd=tcp:" + hostPort + "-" + guestPort

// machine says what VM to run.
type machine struct {
	Interface string // the macvtap; empty if it is the only one
	Addresses string // of the guest, with prefix lengths, with commas
	Queues    int    // of the NIC, each with a CPU; through libvirt alone
	Plain     bool   // the NIC offers the guest no offloads; without libvirt alone
}

// tap is an opened macvtap.
type tap struct {
	link *net.Interface
	path string
	fd   int // stays open in QEMU
}

// findMacvtap returns the macvtap in this network namespace of that name, or
// the only one.
func findMacvtap(name string) (*net.Interface, error) {
	if name == "" {
		found, err := filepath.Glob("/sys/class/net/*/macvtap")
		if err != nil || len(found) != 1 {
			return nil, fmt.Errorf("%d macvtaps are in this network namespace, want one, or its name by --interface "+
				"(%v)", len(found), err)
		}
		name = filepath.Base(filepath.Dir(found[0]))
	}
	link, err := net.InterfaceByName(name)
	if err != nil {
		return nil, fmt.Errorf("look for macvtap %s: %w", name, err)
	}
	return link, nil
}

// openTap opens the character device of a macvtap by its ifindex, as libvirt
// does.
func openTap(link *net.Interface) (tap, error) {
	path := fmt.Sprintf("/dev/tap%d", link.Index)
	fd, err := unix.Open(path, unix.O_RDWR, 0) // without O_CLOEXEC: it is for QEMU
	if err != nil {
		return tap{}, fmt.Errorf("open %s of macvtap %s as user %d: %w", path, link.Name, os.Getuid(), err)
	}
	return tap{link, path, fd}, nil
}

// become replaces this program by QEMU, so that QEMU gets the pod's signals. It
// returns only if that fails.
func (m machine) become(t tap) error {
	err := unix.Exec(qemu, m.arguments(t), os.Environ())
	return fmt.Errorf("run %s: %w", qemu, err)
}

func (m machine) arguments(t tap) []string {
	return []string{
		qemu,
		"-machine",
		"q35",
		"-accel",
		"tcg",
		"-m",
		"192",
		"-smp",
		"1",
		"-nodefaults",
		"-no-user-config",
		"-no-reboot",
		"-display",
		"none",
		"-serial",
		"stdio",
		"-kernel",
		kernel,
		"-initrd",
		initramfs,
		"-append",
		m.commandLine(),
		// The LAN's NIC comes first and is eth0.
		"-netdev",
		fmt.Sprintf("tap,id=lan,fd=%d,vhost=off", t.fd),
		"-device",
		fmt.Sprintf(
			"virtio-net-pci,netdev=lan,mac=%s,host_mtu=%d,romfile=%s",
			t.link.HardwareAddr,
			t.link.MTU,
			m.offloads(),
		),
		"-netdev",
		commandsBackend,
		"-device",
		"virtio-net-pci,netdev=commands,romfile=",
	}
}

// offloads are the NIC's options for them.
func (m machine) offloads() string {
	if !m.Plain {
		return ""
	}
	return ",csum=off,gso=off,host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off" +
		",guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off"
}

// commandLine is the guest kernel's.
func (m machine) commandLine() string {
	return "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check" +
		" guest.addresses=" + m.Addresses + " guest.listen=" + guestPort
}

// awaitStart returns when giveStart is called in another process.
func awaitStart() error {
	if err := unix.Mkfifo(startFIFO, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make %s: %w", startFIFO, err)
	}
	f, err := os.Open(startFIFO) // returns when there is a writer
	if err != nil {
		return fmt.Errorf("wait for the start: %w", err)
	}
	return f.Close()
}

// giveStart lets awaitStart return.
func giveStart() error {
	fd, err := unix.Open(startFIFO, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("no VM waits to be started here: %w", err)
	}
	return unix.Close(fd)
}

// dialGuest returns a connection to the guest as soon as it is up. QEMU takes
// connections before that and breaks them, which nothing announces: hence the
// tries.
func dialGuest(ctx context.Context, patience time.Duration) (*remote.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	const interval = 200 * time.Millisecond
	next := time.NewTicker(interval)
	defer next.Stop()
	for {
		client, err := tryGuest(ctx)
		if err == nil {
			return client, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("the guest was not up in %s: %w", patience, err)
		case <-next.C:
		}
	}
}

// tryGuest dials once. QEMU may take long to break the connection, or have lost
// the guest's answer: it is given up after two seconds.
func tryGuest(ctx context.Context) (*remote.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", hostPort)
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	return remote.Dial(conn)
}
