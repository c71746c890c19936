package kernel

import (
	"errors"
	"fmt"
	"slices"

	"github.com/safchain/ethtool"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/netns"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// txFeatures are the features of a link with which unfinished frames leave by it: without TCP, UDP and SCTP checksums,
// and larger than the MTU. Without them, the kernel finishes each frame before it leaves (validate_xmit_skb and
// skb_csum_hwoffload_help in net/core/dev.c), wherever the frame is from. Older kernels lack some of them.
// Scatter-gather and generic segmentation stay on, because they are done before.
var txFeatures = []string{
	"tx-checksum-ip-generic", "tx-checksum-sctp",
	"tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-tcp-ecn-segmentation",
	"tx-tcp-mangleid-segmentation", "tx-tcp-accecn-segmentation", "tx-udp-segmentation", "tx-sctp-segmentation",
}

// features returns a connection to ethtool in the namespace.
func (c *conn) features() (*ethtool.Ethtool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ethtool != nil {
		return c.ethtool, nil
	}
	err := netns.Do(c.ns, func() (err error) { // the socket stays in the namespace
		c.ethtool, err = ethtool.NewEthtool()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open a socket for ethtool: %w", err)
	}
	return c.ethtool, nil
}

// setTxChecksum switches txFeatures on or off for a link.
func (c *conn) setTxChecksum(name string, on bool) error {
	e, err := c.features()
	if err != nil {
		return err
	}
	have, err := e.Features(name)
	if err != nil {
		return fmt.Errorf("read the features of %s: %w", name, err)
	}
	change := map[string]bool{}
	for _, f := range txFeatures {
		if was, known := have[f]; known && was != on {
			change[f] = on
		}
	}
	if len(change) == 0 {
		return nil
	}
	if err := e.Change(name, change); err != nil {
		return fmt.Errorf("change the features of %s: %w", name, err)
	}
	if have, err = e.Features(name); err != nil {
		return fmt.Errorf("read the features of %s: %w", name, err)
	}
	for _, f := range txFeatures {
		if is, known := have[f]; known && is && !on {
			return fmt.Errorf("%s of %s cannot be switched off", f, name)
		}
	}
	return nil
}

// readTxChecksums reads txFeatures of the links of these spokes.
func (c *conn) readTxChecksums(links []segment.Link, spokes []string) error {
	e, err := c.features()
	if err != nil {
		return err
	}
	for i := range links {
		spoke, ok := links[i].Spoke()
		if !ok || !slices.Contains(spokes, spoke) {
			continue
		}
		have, err := e.Features(links[i].Name)
		if errors.Is(err, unix.ENODEV) { // the link was deleted since the links were listed
			continue
		}
		if err != nil {
			return fmt.Errorf("read the features of %s: %w", links[i].Name, err)
		}
		links[i].TxChecksum = txChecksum(have)
	}
	return nil
}

// txChecksum sums txFeatures up.
func txChecksum(features map[string]bool) segment.TxChecksum {
	on, off := false, false
	for _, f := range txFeatures {
		if is, known := features[f]; known {
			on, off = on || is, off || !is
		}
	}
	switch {
	case !on:
		return segment.TxChecksumOff
	case !off:
		return segment.TxChecksumOn
	default:
		return segment.TxChecksumMixed
	}
}
