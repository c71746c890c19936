package kernel

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// RecordsDir returns the folder of records.
func (n *Node) RecordsDir() string { return filepath.Join(n.paths.Run, "lan") }

func (n *Node) recordPath(name string) string { return filepath.Join(n.RecordsDir(), name+".json") }

// Record reads the last desired state of a segment. It fails with ErrNoLAN where there is none.
func (n *Node) Record(netnsName string) (segment.Segment, error) {
	if err := checkName(netnsName); err != nil {
		return segment.Segment{}, err
	}
	b, err := os.ReadFile(n.recordPath(netnsName))
	if errors.Is(err, fs.ErrNotExist) {
		return segment.Segment{}, fmt.Errorf("%w (no %s)", ErrNoLAN, n.recordPath(netnsName))
	}
	if err != nil {
		return segment.Segment{}, fmt.Errorf("read the record of a LAN: %w", err)
	}
	var s segment.Segment
	if err := json.Unmarshal(b, &s); err != nil {
		err = fmt.Errorf("record %s is damaged; the daemon will write it again: %w", n.recordPath(netnsName), err)
		return segment.Segment{}, err
	}
	return s, nil
}

// Records reads the records of all segments on the node. It skips damaged ones, which the daemon will write again.
func (n *Node) Records() ([]segment.Segment, error) {
	entries, err := os.ReadDir(n.RecordsDir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list the records of LANs: %w", err)
	}
	var records []segment.Segment
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || strings.HasPrefix(name, ".") {
			continue // it is not complete yet
		}
		r, err := n.Record(name)
		switch {
		case err == nil:
			records = append(records, r)
		case !errors.Is(err, ErrNoLAN) && !isDamaged(err):
			return nil, err
		}
	}
	return records, nil
}

// writeRecord writes a segment's record. A reader gets the old one or the new one, never a part.
func (n *Node) writeRecord(s segment.Segment) error {
	b, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("encode the record of %s: %w", s.LAN, err)
	}
	path := n.recordPath(s.Netns)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("write the record of %s: %w", s.LAN, err)
	}
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path))
	err = os.WriteFile(tmp, b, 0o600)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil { // a full file system may have room for the file's name, but not for its content
		return errors.Join(fmt.Errorf("write the record of %s: %w", s.LAN, err), removeFile(tmp))
	}
	return nil
}

// isDamaged reports whether the error of a read says that there is a record, but not a valid one.
func isDamaged(err error) bool {
	var pathErr *fs.PathError
	return !errors.As(err, &pathErr)
}
