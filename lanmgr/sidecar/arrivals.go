package sidecar

import (
	"context"
	"time"
)

// The kernel has no event for an arriving frame, so the interface's counters are polled.
const (
	pollInterval = 10 * time.Second
	// silenceTime is how long frames are sent without one arriving before a warning is logged.
	silenceTime = 30 * time.Second
)

// warnIfNothingArrives logs what to check if frames are sent to peers and none arrives.
func (s *Sidecar) warnIfNothingArrives(ctx context.Context) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	var since time.Time // the interface has peers, and no frame has arrived
	warned := ""        // the interface that a warning was logged about
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
			if warned == v.Name && received > 0 {
				s.Log.Info("frames arrive", "interface", v.Name)
				warned = ""
			}
		case since.IsZero():
			since = now
		case now.Sub(since) >= silenceTime && sent > 0 && warned != v.Name:
			warned = v.Name
			s.Log.Warn(silenceAdvice, "interface", v.Name, "port", v.Port, "vni", v.VNI, "peers", remotes, "sent", sent)
		}
	}
}

const silenceAdvice = "frames are sent, but none has arrived yet: check that neither a NetworkPolicy nor the " +
	"cluster's own network drops this UDP port between the pods (another vxlan.port may help); that all have the " +
	"same vxlan.vni and vxlan.port; that none of them is on its node's own network, " +
	"where something else may have the port"
