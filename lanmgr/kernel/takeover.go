package kernel

import (
	"context"
	"fmt"
	"slices"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// takeOver ends the claim of another sandbox: kubelet has given up its pod, but the sandbox still exists.
func (c *claiming) takeOver(ctx context.Context) error {
	if c.onDemand() {
		return nil // no other pod can have the spoke
	}
	alias, end := c.carrier.Attrs().Alias, func(id string) error { return c.node.endVeth(c.lan, c.Spoke, id) }
	id := c.carrier.Attrs().Name
	if !segment.IsClaimID(id) {
		i := slices.IndexFunc(c.plug.Attrs().AltNames, segment.IsClaimID)
		if i < 0 {
			return nil
		}
		id, alias = c.plug.Attrs().AltNames[i], c.plug.Attrs().Alias
		end = func(id string) error { return c.node.endMacvtap(ctx, c.lan, c.want, c.Spoke, id) }
	}
	old, _ := segment.ParseAlias(id, alias)
	if old.OfSandbox(c.Sandbox) {
		return fmt.Errorf("%w, as %s", ErrSameSandbox, old.Interface)
	}
	if err := end(id); err != nil {
		return err
	}
	c.tookOver = true
	complete, err := c.find() // a VM's pair may have been created again
	if err == nil && !complete {
		err = fmt.Errorf("the standing pair of spoke %s is gone", c.Spoke)
	}
	return err
}
