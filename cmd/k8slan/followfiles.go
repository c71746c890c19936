package main

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"

	"github.com/fsnotify/fsnotify"
)

// followFiles calls changed at first and whenever one of the files may have changed, until ctx ends. It watches their
// folders, because kubelet renames the folder that a Secret's volume shows (AtomicWriter in pkg/volume/util). It logs
// errors.
func followFiles(ctx context.Context, files []string, log *slog.Logger, changed func() error) {
	if len(files) == 0 {
		return
	}
	watcher, err := watchFolders(files)
	if err != nil {
		log.Error("cannot watch files, restart this program when one changes", "files", files, "err", err)
		return
	}
	defer watcher.Close()
	for last := ""; ; {
		text := ""
		if err := changed(); err != nil && ctx.Err() == nil {
			text = err.Error()
		}
		if text != "" && text != last {
			log.Error("cannot use a file that changed, the old values stay", "err", text)
		}
		last = text
		select {
		case <-ctx.Done():
			return
		case <-watcher.Events:
		case err := <-watcher.Errors:
			log.Warn("some changes of files were missed, reading the files again", "err", err)
		}
	}
}

// watchFolders watches the folders of files.
func watchFolders(files []string) (*fsnotify.Watcher, error) {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		if err := watcher.Add(filepath.Dir(file)); err != nil {
			return nil, errors.Join(err, watcher.Close())
		}
	}
	return watcher, nil
}
