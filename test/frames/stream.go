package frames

import (
	"bytes"
	"encoding/binary"
	"net"
	"time"
)

// streamMarker begins the payload of a stream's frames.
const streamMarker = Marker + "stream:"

// Stream returns frame number seq, from 0, of the stream id. A nil dst is replaced by a MAC that no host has, so that
// the frame is flooded.
func Stream(dst, src net.HardwareAddr, id uint32, seq uint64) []byte {
	if dst == nil {
		dst = unknown
	}
	numbers := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(nil, id), seq)
	return ethernet(dst, src, ethertype(typeLocal), []byte(streamMarker), numbers)
}

// parseStream returns the number of a frame of the stream id.
func parseStream(frame []byte, id uint32) (seq uint64, ok bool) {
	_, numbers, ok := bytes.Cut(frame, []byte(streamMarker))
	if !ok || len(numbers) < 12 || binary.BigEndian.Uint32(numbers) != id {
		return 0, false
	}
	return binary.BigEndian.Uint64(numbers[4:]), true
}

// Tally is the count of a stream's frames.
type Tally struct {
	Received   uint64 `json:"received"`   // different frames
	Lost       uint64 `json:"lost"`       // frames that never came
	Duplicates uint64 `json:"duplicates"` // frames that came again
	Reordered  uint64 `json:"reordered"`  // frames that came after a later one

	LongestLoss uint64    `json:"longestLoss"`      // the largest number of frames in a row that never came
	FirstLost   uint64    `json:"firstLost"`        // the number of the first frame of those
	Resumed     time.Time `json:"resumed,omitzero"` // when the first frame after those came; zero if none came
}

// Counter counts the frames of the stream ID with the numbers 0 to Total-1. With a Total of 0 the last frame that comes
// is the end.
type Counter struct {
	ID    uint32
	Total uint64

	seen                            map[uint64]bool
	jumps                           map[uint64]time.Time // when a frame came that did not follow the last one
	duplicates, reordered, expected uint64
}

// Add counts a frame that came at that time if it belongs to the stream.
func (c *Counter) Add(frame []byte, at time.Time) {
	seq, ok := parseStream(frame, c.ID)
	if !ok || c.Total > 0 && seq >= c.Total {
		return
	}
	if c.seen == nil {
		c.seen, c.jumps = map[uint64]bool{}, map[uint64]time.Time{}
	}
	switch {
	case c.seen[seq]:
		c.duplicates++
	case seq < c.expected:
		c.reordered++
	default:
		if seq > c.expected {
			c.jumps[seq] = at
		}
		c.expected = seq + 1
	}
	c.seen[seq] = true
}

// Complete reports whether every frame of the stream came.
func (c *Counter) Complete() bool { return c.Total > 0 && uint64(len(c.seen)) == c.Total }

// Tally returns the count so far.
func (c *Counter) Tally() Tally {
	received, total := uint64(len(c.seen)), c.Total
	if total == 0 {
		total = c.expected
	}
	t := Tally{Received: received, Lost: total - received, Duplicates: c.duplicates, Reordered: c.reordered}
	missing := uint64(0)
	for seq := range total + 1 {
		if !c.seen[seq] && seq < total {
			missing++
			continue
		}
		if missing > t.LongestLoss {
			t.LongestLoss, t.FirstLost, t.Resumed = missing, seq-missing, c.jumps[seq]
		}
		missing = 0
	}
	return t
}
