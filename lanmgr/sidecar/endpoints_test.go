package sidecar

import (
	"net/netip"
	"reflect"
	"testing"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func addrs(texts ...string) []netip.Addr {
	all := []netip.Addr{}
	for _, text := range texts {
		all = append(all, netip.MustParseAddr(text))
	}
	return all
}

func slice(namespace, service string, ready bool, texts ...string) discoveryv1.EndpointSlice {
	s := discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{
		Namespace: namespace, Labels: map[string]string{discoveryv1.LabelServiceName: service},
	}}
	for _, text := range texts {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{text}, Conditions: discoveryv1.EndpointConditions{Ready: &ready},
		})
	}
	return s
}

func TestPeersAreEndpointsOfAllSlices(t *testing.T) {
	web, db, none := Service{"a", "web"}, Service{"b", "db"}, Service{"b", "none"}
	parts := []discoveryv1.EndpointSlice{
		slice("a", "web", true, "10.0.0.3", "10.0.0.1"), slice("a", "web", false, "10.0.0.2", "10.0.0.3"),
		slice("a", "web", true, "fd00::1", "fd00::2"), slice("a", "web", true, "www.example.com"),
		slice("b", "db", true, "10.0.0.3", "10.0.0.9"), slice("b", "web", true, "10.0.0.7"),
		slice("a", "", true, "10.0.0.8"),
	}
	all := endpointsOf([]Service{web, db, none}, parts, false)
	want := endpoints{
		web: addrs("10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "fd00::2"), db: addrs("10.0.0.3", "10.0.0.9"),
		none: addrs(),
	}
	if !reflect.DeepEqual(all, want) {
		t.Errorf("%v, want %v", all, want)
	}
	ready := endpointsOf([]Service{web}, parts, true)[web]
	if !reflect.DeepEqual(ready, addrs("10.0.0.1", "10.0.0.3", "fd00::1", "fd00::2")) {
		t.Errorf("ready are %v", ready)
	}
	own := addrs("10.0.0.1", "fd00::1")
	if peers := all.peers(own[0], own).union(); !reflect.DeepEqual(peers, addrs("10.0.0.2", "10.0.0.3", "10.0.0.9")) {
		t.Errorf("IPv4 peers are %v", peers)
	}
	if peers := all.peers(own[1], own).union(); !reflect.DeepEqual(peers, addrs("fd00::2")) {
		t.Errorf("IPv6 peers are %v", peers)
	}
}

func TestChangesComeServiceByService(t *testing.T) {
	web, db := Service{"a", "web"}, Service{"b", "db"}
	old := endpoints{web: addrs("10.0.0.1", "10.0.0.2"), db: addrs("10.0.0.9"), Service{"c", "old"}: addrs("10.0.0.5")}
	next := endpoints{web: addrs("10.0.0.2", "10.0.0.3"), db: addrs("10.0.0.9")}
	all := changes(old, next)
	want := []change{{web, true, addrs("10.0.0.1")}, {web, false, addrs("10.0.0.3")}}
	if !reflect.DeepEqual(all, want) {
		t.Errorf("%v, want %v", all, want)
	}
	for _, c := range all {
		old = old.apply(c)
	}
	if left := changes(old, next); left != nil {
		t.Errorf("after all changes there are %v", left)
	}
	first := changes(nil, next)
	if len(first) != 2 || first[0].deleted || first[1].deleted {
		t.Errorf("the first changes are %v", first)
	}
	variables := []string{"IFACE=kubelan", "SERVICE=a/web", "IPS=10.0.0.1", "DELETED=true"}
	if got := changeVariables("kubelan", want[0]); !reflect.DeepEqual(got, variables) {
		t.Errorf("%q, want %q", got, variables)
	}
}
