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

// NewWriter writes the file's header.
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
	return p, errors.Join(err, p.to.Flush()) // at once: who reads a pipe waits for it
}

// Write writes a frame; it may stay in the writer until Flush.
func (p Writer) Write(f Frame) error {
	var header []byte
	for _, v := range []uint32{uint32(f.At.Unix()), uint32(f.At.Nanosecond()), uint32(len(f.Bytes)), uint32(len(f.Bytes))} {
		header = binary.LittleEndian.AppendUint32(header, v)
	}
	_, err := p.to.Write(header)
	if err == nil {
		_, err = p.to.Write(f.Bytes)
	}
	return err
}

// Flush hands on what was written.
func (p Writer) Flush() error { return p.to.Flush() }

// Capture writes what the link carries, both ways, until ctx ends or count frames are written; 0 is no limit. A reader
// sees every frame as soon as none waits behind it.
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
