package lanmgr_test

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/segment"
)

// fakeKernel is a kernel in memory: it keeps, for each segment, the state that the applied operations make.
type fakeKernel struct {
	mu           sync.Mutex
	states       map[string]segment.State
	listErr      error // of List
	applyErr     error // of each operation
	observeErr   error // of each observation
	lists        int
	operations   int
	observations int

	unlocked func(segment.State) segment.State // changes what an observation without the lock shows
	after    func(segment.Op)                  // receives each applied operation
	takes    func(netns string) time.Duration  // how long an observation without the lock takes

	reconciled func(lanmgr.Observation) // the manager's OnObserve
}

func (k *fakeKernel) List() ([]string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.lists++
	var names []string
	for netns := range k.states {
		names = append(names, netns)
	}
	return names, k.listErr
}

func (k *fakeKernel) Observe(_ context.Context, netns string) (segment.State, error) {
	if k.takes != nil {
		<-time.After(k.takes(netns))
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.observations++
	s := k.state(netns)
	if k.unlocked != nil {
		s = k.unlocked(s)
	}
	return s, k.observeErr
}

func (k *fakeKernel) Apply(_ context.Context, netns string, ops []segment.Op) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.applyErr != nil {
		return k.applyErr
	}
	have := k.state(netns)
	for _, op := range ops {
		k.operations++
		have = apply(have, op)
	}
	k.states[netns] = have
	return nil
}

func (k *fakeKernel) Release(context.Context, string, string, string) error {
	return errors.New("no test of the manager releases a claim")
}

func (k *fakeKernel) state(netns string) segment.State {
	s := k.states[netns]
	s.Netns, s.Links = netns, slices.Clone(s.Links)
	return s
}

func (k *fakeKernel) Reconcile(
	_ context.Context, netns string, decide func(segment.State) []segment.Op,
) ([]segment.Op, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.observeErr != nil {
		return nil, k.observeErr
	}
	have := k.state(netns)
	var done []segment.Op
	for _, op := range decide(have) {
		if k.applyErr != nil {
			return done, k.applyErr
		}
		k.operations++
		have = apply(have, op)
		done = append(done, op)
		if k.after != nil {
			k.after(op)
		}
	}
	if have.Exists {
		k.states[netns] = have
	} else {
		delete(k.states, netns)
	}
	return done, nil
}

// apply returns the state after an operation.
func apply(s segment.State, op segment.Op) segment.State {
	port := segment.Link{Type: "veth", Master: 1, Up: true, ForwardMask: segment.ForwardMask}
	switch o := op.(type) {
	case segment.CreateNetns:
		s.Exists, s.Silent = true, true
	case segment.RemoveNetns:
		s = segment.State{}
	case segment.WriteRecord:
		s.Record = &o.Segment
	case segment.RemoveRecord:
		s.Record = nil
	case segment.VerifyClaim: // this kernel has no macvtap
		for i := range s.Links {
			if s.Links[i].Name == segment.PlugName(o.Spoke) {
				s.Links[i].AltNames = nil
			}
		}
	case segment.AddBridge:
		s.Links = append(s.Links, segment.Link{Index: 1, Name: o.Name, Type: "bridge", MTU: o.MTU, Up: true})
	case segment.AddVXLAN:
		s.Links = append(s.Links, segment.Link{
			Index: 2, Name: o.Name, Type: "vxlan", MTU: o.MTU, Master: 1,
			ForwardMask: segment.ForwardMask, NoLearning: o.NoLearning,
			VXLAN: segment.VXLANState{
				VNI: o.VNI, Port: o.Port, Group: o.Group, Local: o.Local,
				NoLearning: o.NoLearning, UnderlayIndex: o.UnderlayIndex,
			},
		})
	case segment.AddRemotes, segment.DelRemotes, segment.SetFDB, segment.DelFDB, segment.SetUp, segment.SetDown:
		s = applyToVXLAN(s, op)
	case segment.AddPair:
		port.Name, port.MTU = segment.PortName(o.Spoke), segment.PortMTU(o.MTU)
		s.Links = append(s.Links, port,
			segment.Link{Name: segment.PlugName(o.Spoke), Type: "veth", MTU: o.MTU, Up: true})
	case segment.AddAltName:
		for i := range s.Links {
			if s.Links[i].Name == o.Name {
				s.Links[i].AltNames, s.Links[i].Up = []string{o.AltName}, true
			}
		}
	case segment.DelPairs:
		s.Links = slices.DeleteFunc(s.Links, func(l segment.Link) bool { return l.Type == "veth" })
	case segment.DelLinks:
		for _, link := range o.Names {
			s = apply(s, segment.DelLink{Name: link})
		}
	case segment.DelLink:
		s.Links = slices.DeleteFunc(s.Links, func(l segment.Link) bool {
			return l.Name == o.Name || segment.PortName(l.Name[:max(0, len(l.Name)-2)]) == o.Name
		})
	}
	return s
}

// applyToVXLAN returns the state after an operation that changes the VXLAN only.
func applyToVXLAN(s segment.State, op segment.Op) segment.State {
	i := slices.IndexFunc(s.Links, func(l segment.Link) bool { return l.Type == "vxlan" })
	if i < 0 {
		return s
	}
	v := &s.Links[i].VXLAN
	switch o := op.(type) {
	case segment.AddRemotes:
		v.Remotes = append(slices.Clone(v.Remotes), o.Remotes...)
		slices.SortFunc(v.Remotes, netip.Addr.Compare)
	case segment.DelRemotes:
		v.Remotes = slices.DeleteFunc(slices.Clone(v.Remotes), func(a netip.Addr) bool {
			return slices.Contains(o.Remotes, a)
		})
	case segment.SetFDB:
		v.FDB = slices.Clone(v.FDB)
		for _, e := range o.Entries {
			v.FDB = append(v.FDB, segment.FDBState{FDBEntry: e, Bridge: true})
		}
		slices.SortFunc(v.FDB, func(a, b segment.FDBState) int { return slices.Compare(a.MAC[:], b.MAC[:]) })
	case segment.DelFDB:
		v.FDB = slices.DeleteFunc(slices.Clone(v.FDB), func(e segment.FDBState) bool {
			return slices.Contains(o.Entries, e)
		})
	case segment.SetUp:
		s.Links[i].Up = s.Links[i].Up || o.Name == s.Links[i].Name
	case segment.SetDown:
		s.Links[i].Up = s.Links[i].Up && o.Name != s.Links[i].Name
	}
	return s
}

// set calls f, which may change the fields of the kernel.
func (k *fakeKernel) set(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f()
}

// change changes the state of a segment without the manager.
func (k *fakeKernel) change(netns string, f func(*segment.State)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.states[netns]
	f(&s)
	k.states[netns] = s
}

// attach puts a pod on a spoke, as the CNI plugin does.
func (k *fakeKernel) attach(netns, spoke string) segment.Claim {
	c := segment.Claim{
		ID: segment.ClaimID("c1", "net1"), Spoke: spoke, Kind: segment.Veth,
		Pod: "p", PodNamespace: "default", Interface: "net1", Sandbox: "c1",
	}
	k.change(netns, func(s *segment.State) {
		s.Links = slices.Clone(s.Links)
		for i := range s.Links {
			if s.Links[i].Name == segment.PortName(spoke) {
				s.Links[i].AltNames, s.Links[i].Up = nil, false
			}
		}
		s.Links = append(s.Links, segment.Link{
			Name: c.ID, Type: "veth", AltNames: []string{spoke}, Alias: c.Alias(),
			Master: 1, MTU: 1422, Up: true, ForwardMask: segment.ForwardMask,
		})
	})
	return c
}

func (k *fakeKernel) detach(netns, claimID string) {
	k.change(netns, func(s *segment.State) {
		s.Links = slices.DeleteFunc(slices.Clone(s.Links), func(l segment.Link) bool { return l.Name == claimID })
	})
}
