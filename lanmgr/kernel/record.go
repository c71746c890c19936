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

// Record reads what the node last wanted of a segment. ErrNoLAN where there is none.
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
		return segment.Segment{}, fmt.Errorf("record %s is damaged, the daemon will write it anew: %w", n.recordPath(netnsName), err)
	}
	return s, nil
}

// Records are those of all segments on the node. One that is damaged is passed over: the daemon writes it anew.
func (n *Node) Records() ([]segment.Segment, error) {
	entries, err := os.ReadDir(n.RecordsDir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list the records of LANs: %w", err)
	}
	var records []segment.Segment
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || strings.HasPrefix(name, ".") {
			continue // half written
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

// writeRecord publishes a segment; whoever reads sees the old one or the new one, whole.
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
	if err != nil { // a full file system takes the file's name, but not its content
		return errors.Join(fmt.Errorf("write the record of %s: %w", s.LAN, err), removeFile(tmp))
	}
	return nil
}

// isDamaged says whether a record is there but cannot be understood; it is written anew then.
func isDamaged(err error) bool {
	var pathErr *fs.PathError
	return !errors.As(err, &pathErr)
}
