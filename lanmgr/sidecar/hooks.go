package sidecar

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// runHook runs a program with these variables in addition to the process's own, and logs what it says. It, and what it started, is killed
// where it takes longer than its time.
func runHook(ctx context.Context, log *slog.Logger, what string, h Hooks, command, environment []string, variables ...string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(h.Timeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Env = append(append([]string{}, environment...), variables...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // somebody who left the group may have its output
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	said := lastOutput(out.String())
	switch {
	case ctx.Err() != nil && errors.Is(context.Cause(ctx), context.DeadlineExceeded):
		err = fmt.Errorf("hook %s: took longer than %s and was killed (hooks.timeout)", what, time.Duration(h.Timeout))
	case err != nil:
		err = fmt.Errorf("hook %s: %w", what, err)
	}
	if err != nil && said != "" {
		return fmt.Errorf("%w: %s", err, said)
	}
	if err == nil {
		log.Info("hook has run", "hook", what, "said", said)
	}
	return err
}

// lastOutput is the end of what a program said, in one line.
func lastOutput(text string) string {
	const most = 500
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > most {
		text = "… " + text[len(text)-most:]
	}
	return text
}

// changeVariables are what the change hook is told.
func changeVariables(ifname string, c change) []string {
	var ips []string
	for _, a := range c.ips {
		ips = append(ips, a.String())
	}
	return []string{"IFACE=" + ifname, "SERVICE=" + c.service.String(), "IPS=" + strings.Join(ips, " "), fmt.Sprintf("DELETED=%t", c.deleted)}
}
