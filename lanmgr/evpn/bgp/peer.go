package bgp

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ParsePeers reads peers, each as ParsePeer does, and each address once.
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

// maxHoldTime is the most that an OPEN message has room for, in seconds (RFC 4271, 4.2).
const maxHoldTime = 65535 * time.Second

// ParsePeer reads a peer as people write it: address=192.0.2.1[,port=179][,as=65000][,hold-time=9s][,multihop=2][,password-file=...][,ipv6-vteps].
// The AS is that given where it names none; the password is read.
func ParsePeer(text string, as uint32) (Peer, error) {
	p := Peer{AS: as}
	for field := range strings.SplitSeq(text, ",") {
		key, value, _ := strings.Cut(field, "=")
		var err error
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
				err = errors.New("as is 1 at least")
			}
			p.AS = uint32(number)
		case "hold-time":
			p.HoldTime, err = time.ParseDuration(value)
			if err == nil && (p.HoldTime < 3*time.Second || p.HoldTime > maxHoldTime || p.HoldTime%time.Second != 0) {
				err = errors.New("hold-time is 3s at least and 65535s at most, in whole seconds")
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
		if err != nil {
			return p, err
		}
	}
	if !p.Address.IsValid() {
		return p, errors.New("address= is missing")
	}
	return p, nil
}

// maxPassword is how long a password of TCP MD5 may be (TCP_MD5SIG_MAXKEYLEN in linux/tcp.h).
const maxPassword = 80

// ReadPassword reads the password of sessions from a file.
func ReadPassword(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read the password: %w", err)
	}
	password := strings.TrimSpace(string(b))
	if password == "" || len(password) > maxPassword {
		return "", fmt.Errorf("the password in %s has %d characters, and may have 1 to %d", file, len(password), maxPassword)
	}
	return password, nil
}

// PasswordFiles are those that peers name, written as for ParsePeer.
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

// RouterID is the address, or one made from the name where it is none of IPv4.
func RouterID(address, name string) netip.Addr {
	if a, err := netip.ParseAddr(address); err == nil && a.Unmap().Is4() {
		return a.Unmap()
	}
	sum := sha256.Sum256([]byte(name))
	sum[0] |= 1 // 0.0.0.0 is no router ID
	return netip.AddrFrom4([4]byte(sum[:4]))
}
