package bgp

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
)

// Peer is a router to open a session to.
type Peer struct {
	Address   netip.Addr
	Port      uint16 // 0: 179
	AS        uint32
	HoldTime  time.Duration // whole seconds, at least 3; 0: HoldTime
	Multihop  uint8         // how many hops away a router of another AS may be; 0: it is on the link
	Password  string        `json:"-"` // of TCP MD5 (RFC 2385); empty: none
	Source    netip.Addr    // the local address of the session; the zero Addr: as the node's routing table has it
	IPv6VTEPs bool          // it accepts routes with an IPv6 VTEP. FRR 8.4 closes the session over one
}

// At returns the address and port of the peer.
func (p Peer) At() netip.AddrPort {
	if p.Port == 0 {
		return netip.AddrPortFrom(p.Address, bgp.BGP_PORT)
	}
	return netip.AddrPortFrom(p.Address, p.Port)
}

// String names the peer without its password.
func (p Peer) String() string { return fmt.Sprintf("%s of AS %d", p.At(), p.AS) }

// LogValue keeps the password out of logs in JSON.
func (p Peer) LogValue() slog.Value { return slog.StringValue(p.String()) }

// EqualExceptPassword reports whether two peers differ at most in their passwords.
func (p Peer) EqualExceptPassword(o Peer) bool {
	p.Password = o.Password
	return p == o
}

// ParsePeers reads peers as ParsePeer does. No two may have the same address.
func ParsePeers(texts []string, as uint32) (peers []Peer, err error) {
	for _, text := range texts {
		p, err := ParsePeer(text, as)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", text, err)
		}
		if slices.ContainsFunc(peers, func(o Peer) bool { return o.Address == p.Address }) {
			return nil, fmt.Errorf("%q: there is a peer with that address already", text)
		}
		peers = append(peers, p)
	}
	return peers, nil
}

// maxHoldTime is the longest time that an OPEN message has room for, in seconds (RFC 4271, 4.2).
const maxHoldTime = 65535 * time.Second

// ParsePeer reads a peer as users write it, and the file with its password:
// address=192.0.2.1[,port=179][,as=65000][,hold-time=9s][,multihop=2][,password-file=...][,ipv6-vteps]. as is the AS of
// a peer that names none.
func ParsePeer(text string, as uint32) (Peer, error) {
	p := Peer{AS: as}
	for field := range strings.SplitSeq(text, ",") {
		key, value, _ := strings.Cut(field, "=")
		if err := p.setField(key, value); err != nil {
			return p, err
		}
	}
	if !p.Address.IsValid() {
		return p, errors.New("address= is missing")
	}
	return p, nil
}

func (p *Peer) setField(key, value string) (err error) {
	var number uint64
	switch key {
	case "address":
		p.Address, err = netip.ParseAddr(value)
		p.Address = p.Address.Unmap()
	case "port":
		number, err = strconv.ParseUint(value, 10, 16)
		p.Port = uint16(number)
	case "as":
		if number, err = strconv.ParseUint(value, 10, 32); err == nil && number == 0 {
			err = errors.New("as must be at least 1")
		}
		p.AS = uint32(number)
	case "hold-time":
		p.HoldTime, err = time.ParseDuration(value)
		if err == nil && (p.HoldTime < 3*time.Second || p.HoldTime > maxHoldTime || p.HoldTime%time.Second != 0) {
			err = errors.New("hold-time must be from 3s to 65535s, in whole seconds")
		}
	case "multihop":
		number, err = strconv.ParseUint(value, 10, 8)
		p.Multihop = uint8(number)
	case "password-file":
		p.Password, err = ReadPassword(value)
	case "ipv6-vteps":
		p.IPv6VTEPs = true
	default:
		err = fmt.Errorf("%q is none of address, port, as, hold-time, multihop, password-file and ipv6-vteps", key)
	}
	return err
}

// maxPassword is the longest password of TCP MD5 (TCP_MD5SIG_MAXKEYLEN in linux/tcp.h).
const maxPassword = 80

// ReadPassword reads the password of sessions from a file.
func ReadPassword(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read the password: %w", err)
	}
	password := strings.TrimSpace(string(b))
	if password == "" || len(password) > maxPassword {
		return "", fmt.Errorf("the password in %s has %d characters, and must have 1 to %d",
			file, len(password), maxPassword)
	}
	return password, nil
}

// PasswordFiles returns the password files of peers, which are written as for ParsePeer.
func PasswordFiles(peers []string) (files []string) {
	for _, text := range peers {
		for field := range strings.SplitSeq(text, ",") {
			if file, ok := strings.CutPrefix(field, "password-file="); ok {
				files = append(files, file)
			}
		}
	}
	return files
}

// RouterID returns the address if it is IPv4, else an ID derived from the name.
func RouterID(address, name string) netip.Addr {
	if a, err := netip.ParseAddr(address); err == nil && a.Unmap().Is4() {
		return a.Unmap()
	}
	sum := sha256.Sum256([]byte(name))
	sum[0] |= 1 // 0.0.0.0 is not a router ID
	return netip.AddrFrom4([4]byte(sum[:4]))
}
