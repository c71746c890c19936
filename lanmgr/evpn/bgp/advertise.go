package bgp

import (
	"errors"
	"fmt"

	"github.com/osrg/gobgp/v4/pkg/apiutil"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// Set replaces the routes to advertise. Routes that stay the same are not sent again.
func (s *Speaker) Set(routes []macvrf.Route) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.want = make(map[macvrf.Key]macvrf.Route, len(routes))
	for _, r := range routes {
		s.want[r.Key] = r
	}
	return s.advertise()
}

// advertise sends what differs between want and the Adj-RIB-Out; s.mu is held. It advertises new routes before it
// withdraws old ones.
func (s *Speaker) advertise() error {
	if s.server == nil {
		return nil
	}
	var add, lower, remove []*apiutil.Path
	var keys []macvrf.Key // of add
	var errs []error
	for key, r := range s.want {
		old, advertised := s.adjRIBOut[key]
		if advertised && old.Equal(r) {
			continue
		}
		p, err := pathOf(r)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if advertised && r.Sequence < old.Sequence { // gobgp refuses a lower one (fixupApiPath in pkg/server/server.go)
			lower = append(lower, withdrawal(p))
		}
		add, keys, s.adjRIBOut[key] = append(add, p), append(keys, key), r
	}
	for key, r := range s.adjRIBOut {
		if _, ok := s.want[key]; ok {
			continue
		}
		if p, err := pathOf(r); err == nil { // as when it was advertised
			remove = append(remove, withdrawal(p))
		}
		delete(s.adjRIBOut, key)
	}
	errs = append(errs, s.withdrawPaths(lower), s.addPaths(add, keys), s.withdrawPaths(remove))
	return errors.Join(errs...)
}

// addPaths advertises paths. It takes those that fail out of the Adj-RIB-Out, so that the next call tries again.
func (s *Speaker) addPaths(paths []*apiutil.Path, keys []macvrf.Key) error {
	if len(paths) == 0 {
		return nil
	}
	var errs []error
	results, err := s.server.AddPath(apiutil.AddPathRequest{Paths: paths})
	for i, result := range results {
		if result.Error != nil {
			delete(s.adjRIBOut, keys[i])
			errs = append(errs, fmt.Errorf("advertise the route %s: %w", paths[i].Nlri, result.Error))
		}
	}
	if len(results) == 0 && err != nil {
		errs = append(errs, fmt.Errorf("advertise %d routes: %w", len(paths), err))
	}
	return errors.Join(errs...)
}

func (s *Speaker) withdrawPaths(paths []*apiutil.Path) error {
	if len(paths) == 0 {
		return nil
	}
	return s.server.DeletePath(apiutil.DeletePathRequest{Paths: paths})
}
