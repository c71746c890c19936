package sidecar

import (
	"context"
	"time"
)

// The kernel tells of no frame that arrives, so the interface's counters are read from time to time until the first one has.
const (
	pollInterval = 10 * time.Second
	// silenceTime is how long peers may be there, and be sent to, before it is said that none is heard.
	silenceTime = 30 * time.Second
)

// warnIfNothingArrives says what to look at where nothing arrives though there are peers and frames for them.
func (s *Sidecar) warnIfNothingArrives(ctx context.Context) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	var since time.Time // there are peers, and nothing was heard
	said := ""          // of that interface
	for {
		var now time.Time
		select {
		case <-ctx.Done():
			return nil
		case now = <-tick.C:
		}
		s.mu.Lock()
		v, remotes := s.want.VXLAN, s.remotes
		s.mu.Unlock()
		received, sent, err := s.netns.FrameCounts(v.Name)
		switch {
		case err != nil || received > 0 || remotes == 0:
			since = time.Time{}
			if said == v.Name && received > 0 {
				s.Log.Info("frames arrive", "interface", v.Name)
				said = ""
			}
		case since.IsZero():
			since = now
		case now.Sub(since) >= silenceTime && sent > 0 && said != v.Name:
			said = v.Name
			s.Log.Warn("frames are sent, but none has arrived yet: see that no NetworkPolicy, and not the cluster's own network, drops this UDP port between the pods "+
				"(another vxlan.port may help); that all have the same vxlan.vni and vxlan.port; that none of them is on its node's own network, whose port may be another's",
				"interface", v.Name, "port", v.Port, "vni", v.VNI, "peers", remotes, "sent", sent)
		}
	}
}
