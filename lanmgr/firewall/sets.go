package firewall

import (
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// field is a part of a key in nft(8)'s numbers: a field of a header that nft knows, or bits behind a header.
type field struct {
	bytes    uint32   // its length in the key
	datatype uint32   // enum datatypes (include/datatype.h in nftables)
	userData []uint32 // its user data (payload_expr_build_udata in src/payload.c)
}

// The numbers are from include/proto.h and include/expression.h in nftables.
var (
	portField    = field{2, 13, []uint32{6, 2}}           // udp dport
	vniField     = field{4, 4, []uint32{0, 0, 3, 96, 24}} // @th,96,24
	source4Field = field{4, 7, []uint32{12, 11}}          // ip saddr
	source6Field = field{16, 8, []uint32{13, 8}}          // ip6 saddr
)

var setKeys = map[string][]field{
	lansSet:     {portField, vniField},
	members4Set: {portField, vniField, source4Field},
	members6Set: {portField, vniField, source6Field},
	portsSet:    {portField},
}

// keyLen returns the length of a set's keys in bytes. In a key of several parts, each begins at a multiple of four.
func keyLen(set string) (length uint32) {
	fields := setKeys[set]
	for _, f := range fields {
		if length += f.bytes; len(fields) > 1 {
			length = (length + 3) &^ 3
		}
	}
	return length
}

// addSet returns the message that adds a set. The library cannot set its user data, which says what a key of raw bits
// is. Without user data, nft(8) shows a wrong VNI, and cannot load the ruleset that it saved.
func (t table) addSet(name string) (netlink.Message, error) {
	var datatype uint32
	for _, f := range setKeys[name] {
		datatype = datatype<<nftables.SetConcatTypeBits | f.datatype
	}
	keyType := keyUserData(setKeys[name])
	attributes := []netlink.Attribute{
		{Type: unix.NFTA_SET_TABLE, Data: []byte(t.name + "\x00")},
		{Type: unix.NFTA_SET_NAME, Data: []byte(name + "\x00")},
		{Type: unix.NFTA_SET_FLAGS, Data: binaryutil.BigEndian.PutUint32(0)},
		{Type: unix.NFTA_SET_KEY_TYPE, Data: binaryutil.BigEndian.PutUint32(datatype)},
		{Type: unix.NFTA_SET_KEY_LEN, Data: binaryutil.BigEndian.PutUint32(keyLen(name))},
		{Type: unix.NFTA_SET_ID, Data: binaryutil.BigEndian.PutUint32(1)},
		{Type: unix.NFTA_SET_USERDATA, Data: userdata.Append(nil, userdata.NFTNL_UDATA_SET_KEY_TYPEOF, keyType)},
	}
	if name == lansSet { // each element counts the packets that match it
		counter, err := netlink.MarshalAttributes([]netlink.Attribute{
			{Type: unix.NFTA_EXPR_NAME, Data: []byte("counter\x00")},
			{Type: unix.NFTA_EXPR_DATA | unix.NLA_F_NESTED},
		})
		if err != nil {
			return netlink.Message{}, err
		}
		attributes = append(attributes, netlink.Attribute{
			Type: nftables.NFTA_SET_ELEM_EXPRESSIONS | unix.NLA_F_NESTED, // NFTA_SET_EXPR has the same number
			Data: counter,
		})
	}
	data, err := netlink.MarshalAttributes(attributes)
	if err != nil {
		return netlink.Message{}, err
	}
	return netlink.Message{
		Header: netlink.Header{
			Type:  unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWSET,
			Flags: netlink.Request | netlink.Acknowledge | netlink.Create | netlink.Excl,
		},
		Data: append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, data...),
	}, nil
}

// keyUserData returns the expression of a key in nft(8)'s format: a concatenation or a single field (expr_build_udata
// in src/mnl.c).
func keyUserData(fields []field) []byte {
	const concat, payload = 13, 7 // enum expr_types
	of := func(kind uint32, data []byte) []byte {
		return userdata.Append(userdata.AppendUint32(nil, 0, kind), 1, data)
	}
	var parts []byte
	for i, f := range fields {
		var words []byte
		for n, word := range f.userData {
			words = userdata.AppendUint32(words, userdata.Type(n), word)
		}
		part := of(payload, words)
		if len(fields) == 1 {
			return part
		}
		parts = userdata.Append(parts, userdata.Type(i), part)
	}
	return of(concat, parts)
}

// addSets adds the table's sets in one batch.
func (t table) addSets() error {
	c, err := t.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(answerTimeout)); err != nil {
		return err
	}
	mark := func(kind netlink.HeaderType) netlink.Message {
		return netlink.Message{
			Header: netlink.Header{Type: kind, Flags: netlink.Request},
			Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES},
		}
	}
	batch := []netlink.Message{mark(unix.NFNL_MSG_BATCH_BEGIN)}
	for name := range setKeys {
		m, err := t.addSet(name)
		if err != nil {
			return err
		}
		batch = append(batch, m)
	}
	if _, err := c.SendMessages(append(batch, mark(unix.NFNL_MSG_BATCH_END))); err != nil {
		return err
	}
	for range setKeys { // the kernel answers each message
		if _, err := c.Receive(); err != nil {
			return fmt.Errorf("add sets: %w", err)
		}
	}
	return nil
}
