package kernel

import (
	"errors"
	"fmt"
	"sync"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/k8slan/k8slan/lanmgr/netns"
	"github.com/k8slan/k8slan/lanmgr/rtnl"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// conn is a netlink connection into one network namespace. Many goroutines may use that of an openNetns.
type conn struct {
	*netlink.Handle
	ns netns.Handle

	rtnl *rtnl.Conn // nil until it is needed

	mu      sync.Mutex
	ethtool *ethtool.Ethtool // nil until it is needed; mu guards it
}

// dial connects to a namespace. It owns the handle from then on, also when it fails.
func dial(ns netns.Handle) (*conn, error) {
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	return &conn{Handle: h, ns: ns}, nil
}

// close ends the connection.
func (c *conn) close() {
	if c.Handle != nil {
		c.Handle.Close()
	}
	if c.rtnl != nil {
		c.rtnl.Close()
	}
	if c.ethtool != nil {
		c.ethtool.Close()
	}
	c.ns.Close()
}

// requests returns the connection for the requests that the library lacks.
func (c *conn) requests() (*rtnl.Conn, error) {
	if c.rtnl == nil {
		if err := netns.Do(c.ns, c.dialRTNL); err != nil {
			return nil, err
		}
	}
	return c.rtnl, nil
}

// dialRTNL opens that connection, on a thread that is in the namespace.
func (c *conn) dialRTNL() (err error) {
	c.rtnl, err = rtnl.Dial()
	return err
}

// link finds a link by its name or an altname.
func (c *conn) link(name string) (l netlink.Link, ok bool, err error) {
	l, err = c.LinkByName(name)
	if isNotFound(err) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("look up link %s: %w", name, err)
	}
	return l, true, nil
}

func isNotFound(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing)
}

// links dumps the links of the namespace, but for lo, sorted by index.
func (c *conn) links() ([]segment.Link, error) {
	r, err := c.requests()
	if err != nil {
		return nil, err
	}
	return r.Links()
}

// with calls f with a link that must be there.
func (c *conn) with(name string, f func(netlink.Link) error) error {
	l, ok, err := c.link(name)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("link %s is gone", name)
	}
	return f(l)
}

// request calls f with the index of a link that must be there.
func (c *conn) request(name string, f func(r *rtnl.Conn, index int) error) error {
	return c.with(name, func(l netlink.Link) error {
		r, err := c.requests()
		if err != nil {
			return err
		}
		return f(r, l.Attrs().Index)
	})
}
