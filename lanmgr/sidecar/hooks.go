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

// runChangeHooks runs the change hook for each Service whose peers have changed, one after the other. Changes that
// happen meanwhile come next.
func (s *Sidecar) runChangeHooks(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.peersChanged:
		}
		for ctx.Err() == nil && s.runChangeHook(ctx) {
		}
	}
}

// runChangeHook runs the change hook for the next change. It returns false if there is none.
func (s *Sidecar) runChangeHook(ctx context.Context) bool {
	s.mu.Lock()
	config, peers := s.config, s.peers
	s.mu.Unlock()
	all := changes(s.hookPeers, peers)
	if len(config.Hooks.Change) == 0 || len(all) == 0 {
		s.hookPeers = peers
		return false
	}
	next := all[0]
	variables := changeVariables(config.VXLAN.Interface, next)
	err := runHook(ctx, s.Log, "change", config.Hooks, config.Hooks.Change, s.Environment, variables...)
	if err != nil && ctx.Err() == nil {
		s.Log.Error("the change hook has failed, the LAN goes on", "err", err)
	}
	s.hookPeers = s.hookPeers.apply(next)
	return true
}

// changeVariables returns the environment variables that describe a change to the hook.
func changeVariables(ifname string, c change) []string {
	var ips []string
	for _, a := range c.ips {
		ips = append(ips, a.String())
	}
	return []string{
		"IFACE=" + ifname, "SERVICE=" + c.service.String(), "IPS=" + strings.Join(ips, " "),
		fmt.Sprintf("DELETED=%t", c.deleted),
	}
}

// runHook runs a program with these variables added to the environment, and logs its output. If the program takes
// longer than its timeout, it is killed with all processes of its group.
func runHook(
	ctx context.Context, log *slog.Logger, what string, h Hooks, command, environment []string, variables ...string,
) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(h.Timeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Env = append(append([]string{}, environment...), variables...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // a process that has left the group may keep the output open
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	output := lastOutput(out.String())
	switch {
	case ctx.Err() != nil && errors.Is(context.Cause(ctx), context.DeadlineExceeded):
		timeout := time.Duration(h.Timeout)
		err = fmt.Errorf("hook %s: took longer than %s and was killed (hooks.timeout)", what, timeout)
	case err != nil:
		err = fmt.Errorf("hook %s: %w", what, err)
	}
	if err != nil && output != "" {
		return fmt.Errorf("%w: %s", err, output)
	}
	if err == nil {
		log.Info("hook has run", "hook", what, "output", output)
	}
	return err
}

// lastOutput returns the end of a program's output, in one line.
func lastOutput(text string) string {
	const limit = 500
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > limit {
		text = "… " + text[len(text)-limit:]
	}
	return text
}
