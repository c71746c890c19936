package packet

import (
	"bytes"
	"encoding/hex"
	"testing"
	"time"
)

// tcpdump and Wireshark read these bytes as two frames with times in nanoseconds.
func TestFramesAreWrittenAsPcap(t *testing.T) {
	var out bytes.Buffer
	p, err := NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	if out.Len() != 24 {
		t.Errorf("%d bytes are written before the first frame, want the header of 24", out.Len())
	}
	for _, f := range []Frame{
		{Bytes: []byte{1, 2, 3}, At: time.Unix(1, 5)},
		{Bytes: []byte{4}, At: time.Unix(2, 999_999_999)},
	} {
		if err := p.Write(f); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Flush(); err != nil {
		t.Fatal(err)
	}
	want := "4d3cb2a1" + "02000400" + "00000000" + "00000000" + "40000100" + "01000000" +
		"01000000" + "05000000" + "03000000" + "03000000" + "010203" +
		"02000000" + "ffc99a3b" + "01000000" + "01000000" + "04"
	if got := hex.EncodeToString(out.Bytes()); got != want {
		t.Errorf("wrote\n%s, want\n%s", got, want)
	}
}
