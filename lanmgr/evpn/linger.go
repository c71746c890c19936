package evpn

import (
	"slices"
	"time"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// lingerTime is how long the routes of a LAN are still advertised after the LAN has left EVPN with its attachments, for
// another discovery. Other nodes notice the new discovery at slightly different times, and send by the routes until
// then.
const lingerTime = 5 * time.Second

// lingeringRoutes are routes that are advertised until a time, although the node takes no part in their LAN any more.
type lingeringRoutes struct {
	routes []macvrf.Route
	until  time.Time
}

// linger keeps routes advertised for lingerTime.
func (e *Instance) linger(now time.Time, routes []macvrf.Route) {
	if len(routes) > 0 {
		e.lingering = append(e.lingering, lingeringRoutes{routes, now.Add(lingerTime)})
		e.lingerTimer.Reset(lingerTime)
	}
}

// routes returns the routes to advertise. Lingering routes come first: those of a LAN that is back replace them.
func (e *Instance) routes(now time.Time) (routes []macvrf.Route) {
	e.lingering = slices.DeleteFunc(e.lingering, func(l lingeringRoutes) bool { return !l.until.After(now) })
	for _, l := range e.lingering {
		routes = append(routes, l.routes...)
	}
	return append(routes, e.table.Advertised()...)
}
