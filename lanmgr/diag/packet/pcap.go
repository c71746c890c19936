package packet

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Writer writes frames as pcap with nanoseconds (draft-ietf-opsawg-pcap), which tcpdump and Wireshark read.
type Writer struct{ to *bufio.Writer }

// NewWriter writes the header of the file.
func NewWriter(w io.Writer) (Writer, error) {
	const (
		magic    = 0xa1b23c4d
		version  = 2 | 4<<16
		ethernet = 1 // LINKTYPE_ETHERNET
	)
	p := Writer{bufio.NewWriterSize(w, 1<<18)}
	var header []byte
	for _, v := range []uint32{magic, version, 0, 0, Largest, ethernet} {
		header = binary.LittleEndian.AppendUint32(header, v)
	}
	_, err := p.to.Write(header)
	return p, errors.Join(err, p.to.Flush()) // immediately, because a reader of a pipe waits for the header
}

// Write writes a frame; it may stay in the writer until Flush.
func (p Writer) Write(f Frame) error {
	var header []byte
	length := uint32(len(f.Bytes))
	for _, v := range []uint32{uint32(f.At.Unix()), uint32(f.At.Nanosecond()), length, length} {
		header = binary.LittleEndian.AppendUint32(header, v)
	}
	_, err := p.to.Write(header)
	if err == nil {
		_, err = p.to.Write(f.Bytes)
	}
	return err
}

// Flush writes all buffered frames.
func (p Writer) Flush() error { return p.to.Flush() }

// Capture writes the link's frames in both directions, until ctx ends or count frames are written; 0: no limit. It
// flushes whenever no other frame is waiting.
func Capture(ctx context.Context, s *Socket, w io.Writer, count int) (written int, err error) {
	p, err := NewWriter(w)
	if err != nil {
		return 0, fmt.Errorf("write: %w", err)
	}
	for count == 0 || written < count {
		f, err := s.Next()
		if errors.Is(err, ErrNoFrame) {
			if err := p.Flush(); err != nil {
				return written, fmt.Errorf("write: %w", err)
			}
			f, err = s.Receive(ctx)
		}
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return written, errors.Join(err, p.Flush())
		}
		if err := p.Write(f); err != nil {
			return written, fmt.Errorf("write: %w", err)
		}
		written++
	}
	if err := p.Flush(); err != nil {
		return written, fmt.Errorf("write: %w", err)
	}
	return written, nil
}
