package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"

	"golang.org/x/sys/unix"
)

// reap runs a command, hands it the signals that end a container, and reaps
// what it orphans until it ends: libvirt starts QEMU as a daemon and believes
// that it has ended only once its parent has waited for it. Under KubeVirt
// virt-launcher-monitor does that.
func reap(args []string) error {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGCHLD)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %q: %w", args, err)
	}
	for s := range signals {
		if s != unix.SIGCHLD {
			if err := cmd.Process.Signal(s); err != nil {
				return fmt.Errorf("hand %s on to %q: %w", s, args, err)
			}
			continue
		}
		for { // one signal may stand for several children
			var status unix.WaitStatus
			pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
			if pid == cmd.Process.Pid {
				return exitStatusOf(status)
			}
			if !errors.Is(err, unix.EINTR) && pid <= 0 {
				break
			}
		}
	}
	return nil
}

func exitStatusOf(status unix.WaitStatus) error {
	if status.ExitStatus() == 0 {
		return nil
	}
	return exitStatus(status.ExitStatus()) // -1 after a signal
}
