package firewall

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// TableName is the table of a node's LANs.
const TableName = "k8slan"

const chainName = "input"

// answerTimeout is how long the kernel may take for an answer: it owes one for each message, and sends but one where it knows no nftables.
const answerTimeout = 10 * time.Second

// table is k8slan's table in the netfilter of a node's own namespace, or of a pod's, where the sockets of VXLANs are.
type table struct {
	netns string // path; empty: that of the calling thread
	name  string
}

// dial opens a connection to the namespace's netfilter.
func (t table) dial() (*netlink.Conn, error) {
	config := &netlink.Config{}
	if t.netns != "" {
		ns, err := os.Open(t.netns)
		if err != nil {
			return nil, fmt.Errorf("the node's network namespace: %w", err)
		}
		defer ns.Close()
		config.NetNS = int(ns.Fd())
	}
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, config)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	return c, nil
}

// withConn calls f with the library's connection.
func (t table) withConn(f func(*nftables.Conn) error) error {
	options := []nftables.ConnOption{nftables.WithSockOptions(func(c *netlink.Conn) error {
		return c.SetDeadline(time.Now().Add(answerTimeout))
	})}
	if t.netns != "" {
		ns, err := os.Open(t.netns)
		if err != nil {
			return fmt.Errorf("the node's network namespace: %w", err)
		}
		defer ns.Close()
		options = append(options, nftables.WithNetNSFd(int(ns.Fd())))
	}
	c, err := nftables.New(options...)
	if err != nil {
		return fmt.Errorf("open a netlink socket: %w", err)
	}
	return f(c)
}

// inet is the table for the library.
func (t table) inet() *nftables.Table {
	return &nftables.Table{Name: t.name, Family: nftables.TableFamilyINet}
}

// set is one of the table's sets for the library.
func (t table) set(name string) *nftables.Set { return &nftables.Set{Table: t.inet(), Name: name} }

// Registers of the kernel's, of four bytes each. The first is also called 1.
const (
	regPort = 1
	regVNI  = 9
	regAddr = 10
)

// rule is one of the chain's. It is known again by its words: whoever changes it changes them.
type rule struct {
	comment string
	exprs   []expr.Any
}

// rules of the chain. Up to the first fragment of a UDP packet, which bears the port (RFC 8200, section 4.5), all of a packet is there:
// the kernel puts those of IPv4 together before. Those of IPv6 only where something else on the node wants that (nf_defrag_ipv6), and
// what LAN they are for may be in the second.
func rules() []rule {
	var (
		udp       = []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: regPort}, equal(unix.IPPROTO_UDP)}
		ipv4      = []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: regPort}, equal(unix.NFPROTO_IPV4)}
		ipv6      = []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: regPort}, equal(unix.NFPROTO_IPV6)}
		port      = []expr.Any{&expr.Payload{DestRegister: regPort, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}}
		vni       = []expr.Any{&expr.Payload{DestRegister: regVNI, Base: expr.PayloadBaseTransportHeader, Offset: 8 + 4, Len: 3}}
		source4   = []expr.Any{&expr.Payload{DestRegister: regAddr, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}}
		source6   = []expr.Any{&expr.Payload{DestRegister: regAddr, Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 16}}
		fragment6 = []expr.Any{
			&expr.Exthdr{DestRegister: regPort, Type: unix.IPPROTO_FRAGMENT, Len: 1, Flags: unix.NFT_EXTHDR_F_PRESENT, Op: expr.ExthdrOpIpv6},
			equal(1),
		}
		counter = []expr.Any{&expr.Counter{}}
		accept  = []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
		drop    = []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
	)
	in := func(set string) []expr.Any { return []expr.Any{&expr.Lookup{SourceRegister: regPort, SetName: set}} }
	notIn := func(set string) []expr.Any {
		return []expr.Any{&expr.Lookup{SourceRegister: regPort, SetName: set, Invert: true}}
	}
	return []rule{
		{"no VXLAN", slices.Concat([]expr.Any{udp[0], unequal(unix.IPPROTO_UDP)}, accept)},
		{"no LAN's port", slices.Concat(udp, port, notIn(portsSet), accept)},
		{"VXLANs send no fragments", slices.Concat(udp, ipv6, fragment6, counter, drop)},
		{"members", slices.Concat(udp, ipv4, port, vni, source4, in(members4Set), accept)},
		{"members", slices.Concat(udp, ipv6, port, vni, source6, in(members6Set), accept)},
		{"strangers", slices.Concat(udp, port, vni, in(lansSet), drop)},
	}
}

func equal(value byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpEq, Register: regPort, Data: []byte{value}}
}

func unequal(value byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpNeq, Register: regPort, Data: []byte{value}}
}

// ruleComment is NFTNL_UDATA_RULE_COMMENT (include/libnftnl/udata.h in libnftnl): nft(8) shows it.
const ruleComment userdata.Type = 0

// tableState is the table as it is.
type tableState struct {
	exists   bool
	intact   bool // it has the chain, rules and sets that it should have, and no others
	elements elements
	dropped  map[string]uint64 // packets that were dropped, by the LAN's name
}

// observe reads the table, and what is in some of its sets.
func (t table) observe(sets ...string) (tableState, error) {
	s := tableState{elements: newElements(), dropped: map[string]uint64{}}
	err := t.withConn(func(c *nftables.Conn) error {
		have, err := c.ListTableOfFamily(t.name, nftables.TableFamilyINet)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		s.exists = true
		s.intact, err = t.isIntact(c, have)
		if err != nil || !s.intact {
			return err
		}
		for _, name := range sets {
			list, err := c.GetSetElements(t.set(name))
			if err != nil {
				return err
			}
			for _, e := range list {
				s.elements[name][string(e.Key)] = e.Comment
				if e.Counter != nil {
					s.dropped[e.Comment] += e.Counter.Packets
				}
			}
		}
		return nil
	})
	if err != nil {
		return tableState{}, fmt.Errorf("read nftables' table inet %s: %w", t.name, err)
	}
	return s, nil
}

// isIntact says whether the table is what make makes, whatever its sets have.
func (t table) isIntact(c *nftables.Conn, have *nftables.Table) (bool, error) {
	if have.Flags != 0 { // dormant
		return false, nil
	}
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, err
	}
	chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != t.name })
	if len(chains) != 1 || !isBase(chains[0]) {
		return false, nil
	}
	sets, err := c.GetSets(have)
	if err != nil {
		return false, err
	}
	for _, s := range sets {
		if _, ours := setKeys[s.Name]; !ours || s.KeyType.Bytes != keyLen(s.Name) || s.IsMap || s.Interval || s.HasTimeout {
			return false, nil
		}
	}
	standing, err := c.GetRules(have, chains[0])
	if err != nil {
		return false, err
	}
	return len(sets) == len(setKeys) && slices.EqualFunc(standing, rules(), func(is *nftables.Rule, should rule) bool {
		words, _ := userdata.GetString(is.UserData, ruleComment)
		return words == should.comment
	}), nil
}

func (t table) base() *nftables.Chain {
	policy := nftables.ChainPolicyAccept
	return &nftables.Chain{
		Name: chainName, Table: t.inet(), Type: nftables.ChainTypeFilter, Policy: &policy,
		Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityRaw, // before what others filter
	}
}

func isBase(c *nftables.Chain) bool {
	b := table{}.base()
	return c.Name == b.Name && c.Type == b.Type && c.Hooknum != nil && *c.Hooknum == *b.Hooknum &&
		c.Priority != nil && *c.Priority == *b.Priority && c.Policy != nil && *c.Policy == *b.Policy
}

// create makes the table anew, with empty sets: it lets everything pass.
func (t table) create(exists bool) error {
	err := t.withConn(func(c *nftables.Conn) error {
		if exists {
			c.DelTable(t.inet())
		}
		c.AddTable(t.inet())
		if err := c.Flush(); err != nil {
			return err
		}
		if err := t.addSets(); err != nil {
			return err
		}
		chain := c.AddChain(t.base())
		for _, r := range rules() {
			c.AddRule(&nftables.Rule{Table: t.inet(), Chain: chain, Exprs: r.exprs, UserData: userdata.AppendString(nil, ruleComment, r.comment)})
		}
		return c.Flush()
	})
	if err != nil {
		return fmt.Errorf("make nftables' table inet %s: %w", t.name, err)
	}
	return nil
}

// remove deletes the table; one that is not there is no error, nor is a kernel that knows none.
func (t table) remove() error {
	err := t.withConn(func(c *nftables.Conn) error {
		c.DelTable(t.inet())
		return c.Flush()
	})
	if err == nil || errors.Is(err, os.ErrNotExist) || unsupported(err) {
		return nil
	}
	return fmt.Errorf("delete nftables' table inet %s: %w", t.name, err)
}

// unsupported says whether the kernel has no netfilter (EPROTONOSUPPORT), no nftables (EINVAL to a question, EOPNOTSUPP to a change; both
// in net/netfilter/nfnetlink.c), or none for inet (EAFNOSUPPORT).
func unsupported(err error) bool {
	return errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT)
}

// apply takes a step.
func (t table) apply(s step) error {
	err := t.withConn(func(c *nftables.Conn) error {
		if len(s.del) > 0 {
			if err := c.SetDeleteElements(t.set(s.set), setElements(s.del)); err != nil {
				return err
			}
		}
		if len(s.add) > 0 {
			if err := c.SetAddElements(t.set(s.set), setElements(s.add)); err != nil {
				return err
			}
		}
		return c.Flush()
	})
	if err != nil {
		return fmt.Errorf("change nftables' set %s of table inet %s: %w", s.set, t.name, err)
	}
	return nil
}

func setElements(list []element) []nftables.SetElement {
	elements := make([]nftables.SetElement, len(list))
	for i, e := range list {
		elements[i] = nftables.SetElement{Key: []byte(e.key), Comment: e.name}
	}
	return elements
}

// subscribe opens a connection that hears of every change to the namespace's nftables.
func (t table) subscribe() (*netlink.Conn, error) {
	c, err := t.dial()
	if err != nil {
		return nil, err
	}
	if err := c.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		c.Close()
		return nil, fmt.Errorf("hear of changes: %w", err)
	}
	return c, nil
}

// isOwnEvent says whether an event is of the table. Of each kind of object, the table's name is the first attribute: in
// include/uapi/linux/netfilter/nf_tables.h all of NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE and
// NFTA_SET_ELEM_LIST_TABLE are 1.
func (t table) isOwnEvent(m netlink.Message) bool {
	const genmsg = 4 // struct nfgenmsg
	if len(m.Data) < genmsg || m.Data[0] != unix.NFPROTO_INET {
		return false
	}
	attributes, err := netlink.NewAttributeDecoder(m.Data[genmsg:])
	if err != nil {
		return true
	}
	for attributes.Next() {
		if attributes.Type() == unix.NFTA_TABLE_NAME {
			return attributes.String() == t.name
		}
	}
	return false
}
