package segment

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"strings"
	"time"
)

// Kind is what a pod gets: one end of a veth, or a macvtap.
type Kind string

// The kinds of attachment.
const (
	Veth    Kind = "veth"
	Macvtap Kind = "macvtap"
)

// Claim is one pod's hold on a spoke.
type Claim struct {
	ID           string
	Spoke        string
	Kind         Kind
	PodNamespace string
	Pod          string
	PodUID       string
	Interface    string // in the pod
	Sandbox      string // container ID, which an alias shortens
	Network      string // NetworkMark of the CNI network, if the spoke is on demand; else empty
	MAC          net.HardwareAddr
	Since        time.Time
}

// claimPrefix starts every claim ID. No other link of a segment has a name of that form: the names of a spoke's links
// end in a suffix with an underscore.
const claimPrefix = "k"

// ClaimID names the claim of one interface of one sandbox: 15 characters, so that it fits a link's name.
func ClaimID(containerID, ifname string) string {
	sum := sha256.Sum256([]byte(containerID + "/" + ifname))
	return claimPrefix + hex.EncodeToString(sum[:7])
}

// IsClaimID reports whether a link's name has the form of a claim ID.
func IsClaimID(name string) bool {
	if len(name) != 15 || !strings.HasPrefix(name, claimPrefix) {
		return false
	}
	_, err := hex.DecodeString(name[1:])
	return err == nil
}

// SpokeOnDemand returns the spoke of a claim that takes none of the LAN's spokes. It is created and removed with the
// claim, and has no standing pair. No LAN's own spoke has so long a name.
func SpokeOnDemand(claimID string) string { return strings.TrimPrefix(claimID, claimPrefix) }

// IsOnDemand reports whether a spoke is created with its claim.
func IsOnDemand(spoke string) bool { return IsClaimID(claimPrefix + spoke) }

// NetworkMark identifies a CNI network in an alias, for which its name is too long.
func NetworkMark(network string) string {
	sum := sha256.Sum256([]byte(network))
	return hex.EncodeToString(sum[:4])
}

// maxAlias is the longest alias that Linux keeps for a link (IFALIASZ less the final NUL, include/uapi/linux/if.h).
const maxAlias = 255

// sandboxLen is how much of a container ID an alias keeps: enough to distinguish two.
const sandboxLen = 20

// Alias returns the claim as text, for the link's alias.
func (c Claim) Alias() string {
	sandbox := c.Sandbox
	if len(sandbox) > sandboxLen {
		sandbox = sandbox[:sandboxLen]
	}
	network := ""
	if c.Network != "" {
		network = " net=" + c.Network
	}
	// The pod comes last: its name can have 253 characters, and is the only field that may be cut.
	s := fmt.Sprintf("%s spoke=%s if=%s mac=%s since=%s sandbox=%s%s uid=%s pod=%s/%s",
		c.Kind, c.Spoke, c.Interface, c.MAC,
		c.Since.UTC().Format(time.RFC3339), sandbox, network, c.PodUID, c.PodNamespace, c.Pod)
	if len(s) > maxAlias {
		s = s[:maxAlias]
	}
	return s
}

// ParseAlias reads what Alias wrote; ok is false if the text is not of that form.
func ParseAlias(id, alias string) (c Claim, ok bool) {
	kind, rest, _ := strings.Cut(alias, " ")
	c = Claim{ID: id, Kind: Kind(kind)}
	if c.Kind != Veth && c.Kind != Macvtap {
		return Claim{ID: id}, false
	}
	for field := range strings.FieldsSeq(rest) {
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "spoke":
			c.Spoke = value
		case "if":
			c.Interface = value
		case "mac":
			c.MAC, _ = net.ParseMAC(value)
		case "since":
			c.Since, _ = time.Parse(time.RFC3339, value)
		case "sandbox":
			c.Sandbox = value
		case "net":
			c.Network = value
		case "uid":
			c.PodUID = value
		case "pod":
			c.PodNamespace, c.Pod, _ = strings.Cut(value, "/")
		}
	}
	return c, true
}

// OfSandbox reports whether the claim was made for that container ID.
func (c Claim) OfSandbox(containerID string) bool {
	if len(containerID) > sandboxLen {
		containerID = containerID[:sandboxLen]
	}
	return c.Sandbox == containerID && containerID != ""
}

// IsOf reports whether the claim may have been made for that pod: an alias has only the beginning of a long name.
func (c Claim) IsOf(namespace, pod string) bool {
	return c.PodNamespace == namespace &&
		(c.Pod == pod || len(c.Alias()) == maxAlias && strings.HasPrefix(pod, c.Pod))
}
