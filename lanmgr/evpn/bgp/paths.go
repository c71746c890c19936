package bgp

import (
	"fmt"

	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// pathOf converts a route for gobgp. Labels have the VNI unshifted (RFC 8365, 5.1.3).
func pathOf(r macvrf.Route) (*apiutil.Path, error) {
	rd := bgp.GetRouteDistinguisher(r.RD[:])
	attrs := []bgp.PathAttributeInterface{bgp.NewPathAttributeOrigin(bgp.BGP_ORIGIN_ATTR_TYPE_IGP)}
	communities := []bgp.ExtendedCommunityInterface{bgp.NewEncapExtended(bgp.TUNNEL_TYPE_VXLAN)}
	for _, t := range r.Targets {
		c, err := bgp.ParseExtended(t[:])
		if err != nil {
			return nil, fmt.Errorf("route target %x: %w", t, err)
		}
		communities = append(communities, c)
	}
	var nlri *bgp.EVPNNLRI
	var err error
	switch r.Type {
	case macvrf.Multicast:
		nlri, err = bgp.NewEVPNMulticastEthernetTagRoute(rd, r.Tag, r.IP)
		attrs = append(attrs, bgp.NewPathAttributePmsiTunnel(
			bgp.PMSI_TUNNEL_TYPE_INGRESS_REPL, false, r.VNI, &bgp.IngressReplTunnelID{Value: r.VTEP}))
	case macvrf.MACIP:
		nlri, err = bgp.NewEVPNMacIPAdvertisementRoute(
			rd, bgp.EthernetSegmentIdentifier{}, r.Tag, r.MAC.String(), r.IP, []uint32{r.VNI})
		// It has sequence 0, too: gobgp would choose one for a path without (fixupApiPath in pkg/server/server.go).
		communities = append(communities, bgp.NewMacMobilityExtended(r.Sequence, r.Sticky))
	default:
		err = fmt.Errorf("routes of type %d cannot be advertised", r.Type)
	}
	if err != nil {
		return nil, err
	}
	reach, err := bgp.NewPathAttributeMpReachNLRI(bgp.RF_EVPN, []bgp.PathNLRI{{NLRI: nlri}}, r.VTEP)
	if err != nil {
		return nil, err
	}
	attrs = append(attrs, reach, bgp.NewPathAttributeExtendedCommunities(communities))
	return &apiutil.Path{Family: bgp.RF_EVPN, Nlri: nlri, Attrs: attrs}, nil
}

// withdrawal returns the path that withdraws p. It has no attributes: gobgp would compare them with those it has.
func withdrawal(p *apiutil.Path) *apiutil.Path {
	return &apiutil.Path{Family: p.Family, Nlri: p.Nlri, Withdrawal: true}
}

// routeOf converts a path that was received. ok is false for a route type that no LAN uses. Whether a LAN can use the
// route is for the MAC-VRF to decide.
func routeOf(p *apiutil.Path) (r macvrf.Route, ok bool) {
	if r.Key, ok = keyOf(p); !ok {
		return r, false
	}
	data := p.Nlri.(*bgp.EVPNNLRI).RouteTypeData // keyOf has checked the type
	if mac, isMAC := data.(*bgp.EVPNMacIPAdvertisementRoute); isMAC && len(mac.Labels) > 0 {
		r.VNI = mac.Labels[0]
	}
	for _, attr := range p.Attrs {
		switch a := attr.(type) {
		case *bgp.PathAttributeMpReachNLRI:
			if r.Type == macvrf.MACIP {
				r.VTEP = a.Nexthop
			}
		case *bgp.PathAttributePmsiTunnel:
			if r.Type == macvrf.Multicast {
				r.VNI = a.Label
				id, isReplication := a.TunnelID.(*bgp.IngressReplTunnelID)
				if r.Unsupported = r.Unsupported || !isReplication; isReplication {
					r.VTEP = id.Value
				}
			}
		case *bgp.PathAttributeExtendedCommunities:
			readCommunities(&r, a.Value)
		}
	}
	return r, true
}

// readCommunities reads the extended communities of a route. A route without an encapsulation has the one that is
// configured (RFC 8365, 5.1.3): VXLAN.
func readCommunities(r *macvrf.Route, communities []bgp.ExtendedCommunityInterface) {
	named, vxlan := false, false
	for _, c := range communities {
		switch c := c.(type) {
		case *bgp.EncapExtended:
			named, vxlan = true, vxlan || c.TunnelType == bgp.TUNNEL_TYPE_VXLAN
		case *bgp.MacMobilityExtended:
			r.Sequence, r.Sticky = c.Sequence, c.IsSticky
		default:
			if _, sub := c.GetTypes(); sub != bgp.EC_SUBTYPE_ROUTE_TARGET {
				continue
			}
			if b, err := c.Serialize(); err == nil && len(b) == len(macvrf.Target{}) {
				r.Targets = append(r.Targets, macvrf.Target(b))
			}
		}
	}
	r.Unsupported = r.Unsupported || named && !vxlan
}

// keyOf returns the key of a path. A withdrawal has little more.
func keyOf(p *apiutil.Path) (k macvrf.Key, ok bool) {
	nlri, ok := p.Nlri.(*bgp.EVPNNLRI)
	if !ok {
		return k, false
	}
	var rd bgp.RouteDistinguisherInterface
	switch d := nlri.RouteTypeData.(type) {
	case *bgp.EVPNMacIPAdvertisementRoute:
		if d.MacAddressLength != 8*uint8(len(k.MAC)) || len(d.MacAddress) != len(k.MAC) {
			return k, false
		}
		k = macvrf.Key{Type: macvrf.MACIP, Tag: d.ETag, MAC: macvrf.MAC(d.MacAddress)}
		if d.IPAddressLength > 0 {
			k.IP = d.IPAddress
		}
		rd = d.RD
	case *bgp.EVPNMulticastEthernetTagRoute:
		k, rd = macvrf.Key{Type: macvrf.Multicast, Tag: d.ETag, IP: d.IPAddress}, d.RD
	}
	if rd == nil {
		return k, false
	}
	b, err := rd.Serialize()
	if err != nil || len(b) != len(k.RD) {
		return k, false
	}
	k.RD = macvrf.RD(b)
	return k, true
}
