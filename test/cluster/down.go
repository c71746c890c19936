package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Down ends every process of the cluster and removes all that is left of it,
// the state directory included; what was built stays in the cache. It does as
// much for a cluster that is only half there, and nothing if there is none.
func Down(ctx context.Context, cfg Config) error {
	cfg = cfg.withDefaults()
	if err := checkName(cfg.Name); err != nil {
		return err
	}
	s := state(cfg.Name)
	if err := s.group().Kill(ctx); err != nil {
		return fmt.Errorf("take the cluster down: %w", err)
	}
	// Independent of each other: one that fails keeps none from being tried.
	err := errors.Join(s.removeUnderlay(), s.group().Remove(), s.restoreSysctls())
	if err != nil {
		return fmt.Errorf("take the cluster down: %w", err)
	}
	if err := os.RemoveAll(s.dir()); err != nil {
		return fmt.Errorf("take the cluster down: %w", err)
	}
	return nil
}

// Down is as the function of that name.
func (c *Cluster) Down(ctx context.Context) error {
	return Down(ctx, Config{Name: string(c.state), Log: c.log})
}

// LogDir is the directory with the logs of the processes of the cluster of that
// name, whether it is up or not.
func LogDir(name string) string { return state(name).path("log") }

// SaveLogs copies the logs of the cluster's processes and of its nodes (their
// /var/log) into a directory, before Down or after a failed Up.
func SaveLogs(name, to string) error {
	s := state(name)
	from := map[string]string{s.path("log"): to}
	for _, n := range specs() {
		from[s.disk(n.Name, "var/log")] = filepath.Join(to, n.Name)
	}
	for source, target := range from {
		err := os.CopyFS(target, os.DirFS(source))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("save the logs of %s: %w", source, err)
		}
	}
	return nil
}
