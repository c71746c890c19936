package frames

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"
	"time"
)

var testSrc = mac(0x02, 0, 0, 0, 0, 0x0a)

func TestEveryFrameOfTheCatalogIsUnique(t *testing.T) {
	names, contents := map[string]bool{}, map[string]string{}
	for _, f := range Catalog(testSrc, 1400) {
		if names[f.Name] {
			t.Errorf("two frames are called %s", f.Name)
		}
		if twin, ok := contents[string(f.Bytes)]; ok {
			t.Errorf("%s and %s have the same bytes", f.Name, twin)
		}
		names[f.Name], contents[string(f.Bytes)] = true, f.Name
		if !(Filter{Marker: Marker + f.Name}).Match(f.Bytes) {
			t.Errorf("%s does not carry its marker", f.Name)
		}
	}
}

func TestCatalogFitsTheMTU(t *testing.T) {
	const mtu = 1422
	for _, f := range Catalog(testSrc, mtu) {
		want := 14 + mtu
		if f.Name == "full-mtu-8021q" {
			want += 4
		}
		if full := f.Name == "full-mtu" || f.Name == "full-mtu-8021q"; full && len(f.Bytes) != want {
			t.Errorf("%s has %d bytes, want %d", f.Name, len(f.Bytes), want)
		}
		if len(f.Bytes) < minimum || len(f.Bytes) > want {
			t.Errorf("%s has %d bytes, want %d to %d", f.Name, len(f.Bytes), minimum, want)
		}
	}
}

func TestOnlyPauseDoesNotPass(t *testing.T) {
	for _, f := range Catalog(testSrc, 1400) {
		isPause := bytes.Equal(f.Bytes[:6], mac(0x01, 0x80, 0xc2, 0, 0, 1))
		if f.Passes == isPause {
			t.Errorf("%s passes: %v", f.Name, f.Passes)
		}
	}
}

func TestAllButTheForeignFrameComeFromTheSource(t *testing.T) {
	for _, f := range Catalog(testSrc, 1400) {
		if own := (Filter{Src: testSrc}).Match(f.Bytes); own == (f.Name == "foreign-source") {
			t.Errorf("%s comes from %s", f.Name, net.HardwareAddr(f.Bytes[6:12]))
		}
	}
}

func TestHealthyIPFramesHaveRightChecksums(t *testing.T) {
	ones := func(b ...[]byte) bool { return checksum(b...) == 0 }
	for _, f := range Catalog(testSrc, 1400) {
		packet := f.Bytes[14:]
		switch f.Name {
		case "ipv4-ping", "ospf-hello", "ipv4-multicast":
			length := binary.BigEndian.Uint16(packet[2:])
			if !ones(packet[:20]) {
				t.Errorf("%s has a wrong IPv4 checksum", f.Name)
			}
			if f.Name != "ipv4-multicast" && !ones(packet[20:length]) {
				t.Errorf("%s has a wrong checksum inside", f.Name)
			}
		case "ipv6-ping", "ipv6-neighbor-solicitation":
			length := binary.BigEndian.Uint16(packet[4:])
			if !ones(packet[8:40], packet[4:6], []byte{0, packet[6]}, packet[40:40+length]) {
				t.Errorf("%s has a wrong checksum", f.Name)
			}
		case "malformed-ipv4":
			if ones(packet[:20]) {
				t.Errorf("%s has a right checksum", f.Name)
			}
		}
	}
}

func TestTagGoesOutsideOfOtherTags(t *testing.T) {
	frame := ethernet(unknown, testSrc, tag(Dot1Q, 100), ethertype(typeLocal))
	want := ethernet(unknown, testSrc, tag(Dot1AD, 20), tag(Dot1Q, 100), ethertype(typeLocal))
	if got := Tag(frame, Dot1AD, 20); !bytes.Equal(got[:22], want[:22]) {
		t.Errorf("tagged frame is %x, want %x", got, want)
	}
}

func TestFilterMatchesItsFields(t *testing.T) {
	frame := ethernet(unknown, testSrc, ethertype(typeLLDP), []byte("payload"))
	for name, c := range map[string]struct {
		filter Filter
		want   bool
	}{
		"an empty filter":   {Filter{}, true},
		"ethertype":         {Filter{EtherType: typeLLDP}, true},
		"other ethertype":   {Filter{EtherType: typeARP}, false},
		"source":            {Filter{Src: testSrc}, true},
		"other source":      {Filter{Src: unknown}, false},
		"destination":       {Filter{Dst: unknown}, true},
		"other destination": {Filter{Dst: testSrc}, false},
		"marker":            {Filter{Marker: "yloa"}, true},
		"other marker":      {Filter{Marker: "absent"}, false},
		"all of it":         {Filter{typeLLDP, testSrc, unknown, "payload"}, true},
		"one thing wrong":   {Filter{typeLLDP, testSrc, testSrc, "payload"}, false},
	} {
		if got := c.filter.Match(frame); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	if (Filter{}).Match(frame[:13]) {
		t.Error("a filter matches a frame without a whole header")
	}
}

func TestCounterCountsLossDuplicatesAndReordering(t *testing.T) {
	began := time.Now()
	at := func(i int) time.Time { return began.Add(time.Duration(i) * time.Second) }
	for name, c := range map[string]struct {
		arrived []uint64
		want    Tally
	}{
		"all in order": {[]uint64{0, 1, 2, 3}, Tally{Received: 4}},
		"nothing":      {nil, Tally{Lost: 4, LongestLoss: 4}},
		"one lost": {
			[]uint64{0, 2, 3}, Tally{Received: 3, Lost: 1, LongestLoss: 1, FirstLost: 1, Resumed: at(1)},
		},
		"two in a row":   {[]uint64{0, 3}, Tally{Received: 2, Lost: 2, LongestLoss: 2, FirstLost: 1, Resumed: at(1)}},
		"two apart":      {[]uint64{1, 3}, Tally{Received: 2, Lost: 2, LongestLoss: 1, Resumed: at(0)}},
		"the last lost":  {[]uint64{0, 1, 2}, Tally{Received: 3, Lost: 1, LongestLoss: 1, FirstLost: 3}},
		"one twice":      {[]uint64{0, 1, 1, 2, 3}, Tally{Received: 4, Duplicates: 1}},
		"one late":       {[]uint64{0, 2, 1, 3}, Tally{Received: 4, Reordered: 1}},
		"one late twice": {[]uint64{0, 2, 1, 1, 3}, Tally{Received: 4, Duplicates: 1, Reordered: 1}},
		"beyond the end": {[]uint64{0, 1, 2, 3, 4}, Tally{Received: 4}},
	} {
		counter := Counter{ID: 7, Total: 4}
		for i, seq := range c.arrived {
			counter.Add(Stream(nil, testSrc, 7, seq), at(i))
			counter.Add(Stream(nil, testSrc, 8, seq), at(i))
		}
		for _, f := range Catalog(testSrc, 1400) {
			counter.Add(f.Bytes, began)
		}
		if got := counter.Tally(); got != c.want {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
		if counter.Complete() != (c.want.Lost == 0) {
			t.Errorf("%s: complete %v with %d lost", name, counter.Complete(), c.want.Lost)
		}
	}
}

func TestCounterOfAStreamOfUnknownLength(t *testing.T) {
	var counter Counter
	for _, seq := range []uint64{0, 1, 4} {
		counter.Add(Stream(nil, testSrc, 0, seq), time.Unix(int64(seq), 0))
	}
	want := Tally{Received: 3, Lost: 2, LongestLoss: 2, FirstLost: 2, Resumed: time.Unix(4, 0)}
	if got := counter.Tally(); got != want || counter.Complete() {
		t.Errorf("%+v, complete %v; want %+v, and never complete", got, counter.Complete(), want)
	}
}
