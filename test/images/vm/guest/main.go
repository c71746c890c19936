// Command guest is the first program of a test VM: it loads the drivers, sets
// the NICs up as the kernel's command line says, and runs the commands that it receives.
//
// The VM has two NICs: eth0 on the LAN, and eth1, which leads nowhere but to
// the program vm beside QEMU and carries its commands.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/test/images/vm/remote"
)

func main() {
	if err := boot(context.Background()); err != nil {
		fmt.Println("guest:", err)
	}
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Println("guest: power off:", err)
	}
}

func boot(ctx context.Context) error {
	if err := os.Setenv("PATH", "/bin"); err != nil { // the kernel gives none
		return err
	}
	if err := mounts(); err != nil {
		return err
	}
	if err := modules(); err != nil {
		return err
	}
	parameters, err := readParameters()
	if err != nil {
		return err
	}
	if err := network(parameters["guest.addresses"]); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", parameters["guest.listen"])
	if err != nil {
		return fmt.Errorf("listen for commands: %w", err)
	}
	uptime, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return fmt.Errorf("read the uptime: %w", err)
	}
	eth0, err := net.InterfaceByName("eth0")
	if err != nil {
		return fmt.Errorf("look at the LAN's NIC: %w", err)
	}
	fmt.Printf("guest: up %s s after the kernel's start: eth0 %s mtu %d %s\n",
		strings.Fields(string(uptime))[0], eth0.HardwareAddr, eth0.MTU, parameters["guest.addresses"])
	return serve(ctx, listener)
}

func mounts() error {
	for path, kind := range map[string]string{"/proc": "proc", "/sys": "sysfs", "/dev": "devtmpfs"} {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return fmt.Errorf("make a mount point: %w", err)
		}
		if err := unix.Mount(kind, path, kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s on %s: %w", kind, path, err)
		}
	}
	return nil
}

// modules loads the modules in /lib/modules in the order of their names, which
// is the order in which they need each other.
func modules() error {
	entries, err := os.ReadDir("/lib/modules")
	if err != nil {
		return fmt.Errorf("look for kernel modules: %w", err)
	}
	for _, e := range entries {
		f, err := os.Open("/lib/modules/" + e.Name())
		if err != nil {
			return fmt.Errorf("open a kernel module: %w", err)
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("load kernel module %s: %w", e.Name(), err)
		}
	}
	return nil
}

// readParameters returns the words key=value of the kernel's command line.
func readParameters() (map[string]string, error) {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, fmt.Errorf("read the kernel's command line: %w", err)
	}
	parameters := map[string]string{}
	for _, word := range strings.Fields(string(line)) {
		if key, value, ok := strings.Cut(word, "="); ok {
			parameters[key] = value
		}
	}
	return parameters, nil
}

// network brings the NICs up, with addresses in a list with commas for eth0.
func network(addresses string) error {
	// eth1 is for commands alone: nothing but its IPv4 address, which the user
	// mode network of QEMU expects there.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/eth1/disable_ipv6", []byte("1"), 0); err != nil {
		return fmt.Errorf("switch IPv6 off on eth1: %w", err)
	}
	commands := []string{"link set lo up", "addr add 10.0.2.15/24 dev eth1", "link set eth1 up", "link set eth0 up"}
	for _, a := range strings.Split(addresses, ",") {
		if a != "" {
			commands = append(commands, "addr add "+a+" dev eth0")
		}
	}
	for _, c := range commands {
		if out, err := exec.Command("/bin/ip", strings.Fields(c)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", c, err, bytes.TrimSpace(out))
		}
	}
	return nil
}

// serve runs the commands that come, several at once.
func serve(ctx context.Context, listener net.Listener) error {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return fmt.Errorf("accept a command: %w", err)
		}
		go func() { // ends with its connection
			if err := remote.Serve(ctx, conn); err != nil {
				fmt.Println("guest:", err)
			}
		}()
	}
}
