package bgp

import (
	"fmt"

	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// pathOf is one of our routes as it is sent. Labels bear the VNI as it is (RFC 8365, 5.1.3).
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
		attrs = append(attrs, bgp.NewPathAttributePmsiTunnel(bgp.PMSI_TUNNEL_TYPE_INGRESS_REPL, false, r.VNI, &bgp.IngressReplTunnelID{Value: r.VTEP}))
	case macvrf.MACIP:
		nlri, err = bgp.NewEVPNMacIPAdvertisementRoute(rd, bgp.EthernetSegmentIdentifier{}, r.Tag, r.MAC.String(), r.IP, []uint32{r.VNI})
		// Also where it is 0, or gobgp would add one (fixupApiPath in pkg/server/server.go).
		communities = append(communities, bgp.NewMacMobilityExtended(r.Sequence, r.Sticky))
	default:
		err = fmt.Errorf("no route of type %d is told", r.Type)
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

// withdrawal is the end of a route. It bears no attributes: gobgp would compare them with what it has.
func withdrawal(p *apiutil.Path) *apiutil.Path {
	return &apiutil.Path{Family: p.Family, Nlri: p.Nlri, Withdrawal: true}
}

// routeOf reads a route; ok is false for one of a kind that does not matter to a LAN. What is wrong with it otherwise is for the
// table to say.
func routeOf(p *apiutil.Path) (r macvrf.Route, ok bool) {
	if r.Key, ok = keyOf(p); !ok {
		return r, false
	}
	if mac, isMAC := p.Nlri.(*bgp.EVPNNLRI).RouteTypeData.(*bgp.EVPNMacIPAdvertisementRoute); isMAC && len(mac.Labels) > 0 {
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

// readCommunities reads what a route's extended communities tell. Without one that names an encapsulation it is the one that is
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

// keyOf reads what tells a route from others; a withdrawal has little more.
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
