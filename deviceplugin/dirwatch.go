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
	notify  *fsnotify.Watcher
}

func newDirWatch(dir string) (*dirWatch, error) {
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	w := &dirWatch{dir: dir, notify: notify}
	if err := w.approach(); err != nil {
		return nil, errors.Join(err, notify.Close())
	}
	return w, nil
}

func (w *dirWatch) events() <-chan fsnotify.Event { return w.notify.Events }
func (w *dirWatch) errors() <-chan error          { return w.notify.Errors }
func (w *dirWatch) close()                        { _ = w.notify.Close() }

// follow moves the watch when event made it possible or necessary, and reports whether it did.
func (w *dirWatch) follow(event fsnotify.Event) (bool, error) {
	gone := event.Name == w.watched && (event.Has(fsnotify.Remove) || event.Has(fsnotify.Rename))
	if !gone && w.watched == w.dir {
		return false, nil
	}
	if gone {
		// A renamed directory would be watched on under its old name.
		if err := w.notify.Remove(w.watched); err != nil && !errors.Is(err, fsnotify.ErrNonExistentWatch) {
			return false, err
		}
		w.watched = ""
	}
	before := w.watched
	err := w.approach()
	return w.watched != before, err
}

// approach watches dir or its nearest ancestor. What appears between looking and watching is not missed: it
// looks again after each step.
func (w *dirWatch) approach() error {
	for {
		nearest, err := nearestDir(w.dir)
		if err != nil {
			return err
		}
		if nearest == w.watched {
			return nil
		}
		err = w.notify.Add(nearest)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if w.watched != "" {
			if err := w.notify.Remove(w.watched); err != nil && !errors.Is(err, fsnotify.ErrNonExistentWatch) {
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
