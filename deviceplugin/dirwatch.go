package deviceplugin

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/fsnotify/fsnotify"
)

// dirWatch watches a directory or, while that is not there, its nearest ancestor that is.
type dirWatch struct {
	dir     string
	watched string
	watcher *fsnotify.Watcher
}

func newDirWatch(dir string) (*dirWatch, error) {
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	w := &dirWatch{dir: dir, watcher: notify}
	if err := w.watchNearest(); err != nil {
		return nil, errors.Join(err, notify.Close())
	}
	return w, nil
}

func (w *dirWatch) events() <-chan fsnotify.Event { return w.watcher.Events }
func (w *dirWatch) errors() <-chan error          { return w.watcher.Errors }
func (w *dirWatch) close()                        { _ = w.watcher.Close() }

// follow moves the watch when event made it possible or necessary, and reports whether it did.
func (w *dirWatch) follow(event fsnotify.Event) (bool, error) {
	gone := event.Name == w.watched && (event.Has(fsnotify.Remove) || event.Has(fsnotify.Rename))
	if !gone && w.watched == w.dir {
		return false, nil
	}
	if gone {
		// A renamed directory would be watched on under its old name.
		if err := w.watcher.Remove(w.watched); err != nil && !errors.Is(err, fsnotify.ErrNonExistentWatch) {
			return false, err
		}
		w.watched = ""
	}
	before := w.watched
	err := w.watchNearest()
	return w.watched != before, err
}

// watchNearest watches dir or its nearest ancestor. What appears between looking and watching is not missed: it
// looks again after each step.
func (w *dirWatch) watchNearest() error {
	for {
		nearest, err := nearestDir(w.dir)
		if err != nil {
			return err
		}
		if nearest == w.watched {
			return nil
		}
		err = w.watcher.Add(nearest)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if w.watched != "" {
			if err := w.watcher.Remove(w.watched); err != nil && !errors.Is(err, fsnotify.ErrNonExistentWatch) {
				return err
			}
		}
		w.watched = nearest
	}
}

// nearestDir is dir if it exists, else its nearest ancestor.
func nearestDir(dir string) (string, error) {
	for {
		_, err := os.Stat(dir)
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return dir, err
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", err
		}
		dir = parent
	}
}
