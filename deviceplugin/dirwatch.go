package deviceplugin

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/fsnotify/fsnotify"
)

// dirWatch watches a directory or, while that does not exist, its nearest existing ancestor.
type dirWatch struct {
	dir     string
	watched string // the directory or an ancestor
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

// follow moves the watch if the event makes that possible or necessary, and reports whether it moved it.
func (w *dirWatch) follow(event fsnotify.Event) (bool, error) {
	removed := event.Name == w.watched && (event.Has(fsnotify.Remove) || event.Has(fsnotify.Rename))
	if !removed && w.watched == w.dir {
		return false, nil
	}
	if removed {
		// Without this, a renamed directory would stay watched under its old name.
		if err := w.watcher.Remove(w.watched); err != nil && !errors.Is(err, fsnotify.ErrNonExistentWatch) {
			return false, err
		}
		w.watched = ""
	}
	before := w.watched
	err := w.watchNearest()
	return w.watched != before, err
}

// watchNearest watches dir or its nearest existing ancestor. It repeats that until nothing changes, so that it does not
// miss a directory that is created between the check and the watch.
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

// nearestDir returns dir if it exists, else its nearest existing ancestor.
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
