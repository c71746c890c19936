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

// answerTimeout is how long the kernel may take to answer. It answers each message, but a kernel without nftables
// answers only the first.
const answerTimeout = 10 * time.Second

// table is k8slan's nftables table in the network namespace that has the sockets of the VXLANs: the node's, or a pod's.
type table struct {
	netns string // path; empty: the calling thread's
	name  string
}

// dial opens a netlink connection to the namespace's netfilter.
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

// withConn calls f with a connection of the nftables library.
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

// inet returns the table in the library's type.
func (t table) inet() *nftables.Table {
	return &nftables.Table{Name: t.name, Family: nftables.TableFamilyINet}
}

// set returns one of the table's sets in the library's type.
func (t table) set(name string) *nftables.Set { return &nftables.Set{Table: t.inet(), Name: name} }

// Registers of the kernel (enum nft_registers). 1 begins at byte 0, 9 at byte 4, 10 at byte 8.
const (
	regPort = 1
	regVNI  = 9
	regAddr = 10
)

// rule is a rule of the chain. The comment identifies it, so a change of its expressions needs another comment.
type rule struct {
	comment string
	exprs   []expr.Any
}

// rules returns the rules of the chain. They see whole IPv4 packets, because the kernel reassembles fragments before.
// It reassembles IPv6 fragments only if something else on the node needs that (nf_defrag_ipv6). The first fragment has
// the UDP port (RFC 8200, section 4.5), but the VNI may be in the second.
func rules() []rule {
	const network, transport = expr.PayloadBaseNetworkHeader, expr.PayloadBaseTransportHeader
	header := func(register uint32, base expr.PayloadBase, offset, length uint32) []expr.Any {
		return []expr.Any{&expr.Payload{DestRegister: register, Base: base, Offset: offset, Len: length}}
	}
	var (
		udp       = []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: regPort}, equal(unix.IPPROTO_UDP)}
		ipv4      = []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: regPort}, equal(unix.NFPROTO_IPV4)}
		ipv6      = []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: regPort}, equal(unix.NFPROTO_IPV6)}
		port      = header(regPort, transport, 2, 2)
		vni       = header(regVNI, transport, 8+4, 3)
		source4   = header(regAddr, network, 12, 4)
		source6   = header(regAddr, network, 8, 16)
		fragment6 = []expr.Any{
			&expr.Exthdr{
				DestRegister: regPort, Type: unix.IPPROTO_FRAGMENT, Len: 1,
				Flags: unix.NFT_EXTHDR_F_PRESENT, Op: expr.ExthdrOpIpv6,
			},
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
		{"not UDP", slices.Concat([]expr.Any{udp[0], unequal(unix.IPPROTO_UDP)}, accept)},
		{"not a LAN's port", slices.Concat(udp, port, notIn(portsSet), accept)},
		{"VXLANs send no fragments", slices.Concat(udp, ipv6, fragment6, counter, drop)},
		{"members", slices.Concat(udp, ipv4, port, vni, source4, in(members4Set), accept)},
		{"members", slices.Concat(udp, ipv6, port, vni, source6, in(members6Set), accept)},
		{"non-members", slices.Concat(udp, port, vni, in(lansSet), drop)},
	}
}

func equal(value byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpEq, Register: regPort, Data: []byte{value}}
}

func unequal(value byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpNeq, Register: regPort, Data: []byte{value}}
}

// ruleComment is NFTNL_UDATA_RULE_COMMENT (include/libnftnl/udata.h in libnftnl). nft(8) shows the comment.
const ruleComment userdata.Type = 0

// tableState is what observe reads of the table.
type tableState struct {
	exists   bool
	intact   bool // the table has the chain, rules and sets that create makes, and no others
	elements elements
	dropped  map[string]uint64 // packets that were dropped, by the LAN's name
}

// observe reads the table, and the elements of these sets.
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
		return tableState{}, fmt.Errorf("read nftables table inet %s: %w", t.name, err)
	}
	return s, nil
}

// isIntact reports whether the table is as create makes it, apart from the elements of its sets.
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
		_, ours := setKeys[s.Name]
		if !ours || s.KeyType.Bytes != keyLen(s.Name) || s.IsMap || s.Interval || s.HasTimeout {
			return false, nil
		}
	}
	haveRules, err := c.GetRules(have, chains[0])
	if err != nil {
		return false, err
	}
	sameRules := slices.EqualFunc(haveRules, rules(), func(have *nftables.Rule, want rule) bool {
		comment, _ := userdata.GetString(have.UserData, ruleComment)
		return comment == want.comment
	})
	return len(sets) == len(setKeys) && sameRules, nil
}

func (t table) base() *nftables.Chain {
	policy := nftables.ChainPolicyAccept
	return &nftables.Chain{
		Name: chainName, Table: t.inet(), Type: nftables.ChainTypeFilter, Policy: &policy,
		Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityRaw, // before the chains of other programs
	}
}

func isBase(c *nftables.Chain) bool {
	b := table{}.base()
	return c.Name == b.Name && c.Type == b.Type && c.Hooknum != nil && *c.Hooknum == *b.Hooknum &&
		c.Priority != nil && *c.Priority == *b.Priority && c.Policy != nil && *c.Policy == *b.Policy
}

// create creates the table with empty sets, so that it accepts all packets. It replaces a table that exists.
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
			comment := userdata.AppendString(nil, ruleComment, r.comment)
			c.AddRule(&nftables.Rule{Table: t.inet(), Chain: chain, Exprs: r.exprs, UserData: comment})
		}
		return c.Flush()
	})
	if err != nil {
		return fmt.Errorf("create nftables table inet %s: %w", t.name, err)
	}
	return nil
}

// remove deletes the table. It is no error if the table does not exist or the kernel has no nftables.
func (t table) remove() error {
	err := t.withConn(func(c *nftables.Conn) error {
		c.DelTable(t.inet())
		return c.Flush()
	})
	if err == nil || errors.Is(err, os.ErrNotExist) || unsupported(err) {
		return nil
	}
	return fmt.Errorf("delete nftables table inet %s: %w", t.name, err)
}

// unsupported reports whether the kernel has no netfilter (EPROTONOSUPPORT), no nftables (EINVAL for a query,
// EOPNOTSUPP for a change; both in net/netfilter/nfnetlink.c), or no nftables for inet (EAFNOSUPPORT).
func unsupported(err error) bool {
	return errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL) ||
		errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT)
}

// apply applies one step.
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
		return fmt.Errorf("change set %s of nftables table inet %s: %w", s.set, t.name, err)
	}
	return nil
}

func setElements(list []element) []nftables.SetElement {
	elements := make([]nftables.SetElement, len(list))
	for i, e := range list {
		elements[i] = nftables.SetElement{Key: []byte(e.key), Comment: e.comment}
	}
	return elements
}

// subscribe opens a connection that receives an event for each change of the namespace's nftables.
func (t table) subscribe() (*netlink.Conn, error) {
	c, err := t.dial()
	if err != nil {
		return nil, err
	}
	if err := c.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		c.Close()
		return nil, fmt.Errorf("subscribe to changes: %w", err)
	}
	return c, nil
}

// isOwnEvent reports whether an event concerns the table. The attribute with the table's name has the same number for
// all kinds of objects: in include/uapi/linux/netfilter/nf_tables.h, NFTA_TABLE_NAME, NFTA_CHAIN_TABLE,
// NFTA_RULE_TABLE, NFTA_SET_TABLE and NFTA_SET_ELEM_LIST_TABLE are all 1.
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
