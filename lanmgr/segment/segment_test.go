package segment_test

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/segment"
)

// full is a segment with an element in every list.
func full() segment.Segment {
	s := unicast("192.0.2.1", "192.0.2.2")
	s.TxChecksumOff, s.MACByOrdinal, s.AllowedNamespaces = []string{"srl"}, []string{"web"}, []string{"blue"}
	s.Routes = segment.Routes{Import: []string{"65000:1"}, Export: []string{"65000:2"}}
	s.FDB = []segment.FDBEntry{{MAC: [6]byte{2}, VTEP: s.Remotes[0]}}
	s.Neighbors = []segment.Neighbor{{IP: netip.MustParseAddr("10.0.0.1"), MAC: [6]byte{2}}}
	return s
}

// The daemon does nothing for a change that Equal does not see. It counts every field, so this test has no exceptions.
func TestEqualCountsEveryField(t *testing.T) {
	eachChange(t, full(), func(field string, changed segment.Segment) {
		if s := full(); s.Equal(changed) || changed.Equal(s) {
			t.Errorf("segments that differ in %s are equal", field)
		}
	})
	eachChange(t, full().Routes, func(field string, changed segment.Routes) {
		if r := full().Routes; r.Equal(changed) || changed.Equal(r) {
			t.Errorf("routes that differ in %s are equal", field)
		}
	})
	if !full().Equal(full()) || !full().Routes.Equal(full().Routes) {
		t.Error("a segment is not equal to itself")
	}
	for table, empty := range map[string]func(*segment.Segment){
		"Remotes":   func(s *segment.Segment) { s.Remotes = []netip.Addr{} },
		"FDB":       func(s *segment.Segment) { s.FDB = []segment.FDBEntry{} },
		"Neighbors": func(s *segment.Segment) { s.Neighbors = []segment.Neighbor{} },
	} {
		unknown, known := lab, lab
		if empty(&known); unknown.Equal(known) || known.Equal(unknown) {
			t.Errorf("unknown %s are equal to none", table)
		}
	}
}

// eachChange calls f for each field of a struct, at any depth, with a copy that differs from it in that field only. In
// a list, which must not be empty, it changes the length and the first element.
func eachChange[T any](t *testing.T, from T, f func(field string, changed T)) {
	t.Helper()
	root := reflect.New(reflect.TypeFor[T]()).Elem()
	root.Set(reflect.ValueOf(from))
	set := func(path string, field reflect.Value, to any) {
		old := reflect.ValueOf(field.Interface())
		field.Set(reflect.ValueOf(to).Convert(field.Type()))
		f(path, root.Interface().(T))
		field.Set(old)
	}
	var walk func(path string, field reflect.Value)
	walk = func(path string, field reflect.Value) {
		kind := field.Kind()
		switch {
		case field.Type() == reflect.TypeFor[netip.Addr]():
			set(path, field, netip.MustParseAddr("198.51.100.1"))
		case kind == reflect.Struct:
			for i := range field.NumField() {
				walk(path+"."+field.Type().Field(i).Name, field.Field(i))
			}
		case kind == reflect.Slice && field.Len() > 0:
			list := reflect.ValueOf(field.Interface())
			set(path, field, list.Slice(0, 0).Interface())
			field.Set(reflect.AppendSlice(reflect.MakeSlice(list.Type(), 0, 0), list)) // from keeps its own elements
			walk(path+"[0]", field.Index(0))
			field.Set(list)
		case kind == reflect.Array:
			walk(path+"[0]", field.Index(0))
		case kind == reflect.Bool:
			set(path, field, !field.Bool())
		case kind == reflect.String:
			set(path, field, field.String()+"x")
		case field.CanInt():
			set(path, field, field.Int()+1)
		case field.CanUint():
			set(path, field, field.Uint()+1)
		default:
			t.Fatalf("this test cannot change %s, a %s", path, field.Type())
		}
	}
	walk(root.Type().Name(), root)
}

func TestRecordHasAllButTheTables(t *testing.T) {
	s := full()
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var read segment.Segment
	if err := json.Unmarshal(b, &read); err != nil || !read.Equal(s.Recorded()) {
		t.Errorf("the record is read as %+v, %v", read, err)
	}
	eachChange(t, s, func(field string, changed segment.Segment) {
		b, err := json.Marshal(changed)
		if err != nil {
			t.Fatal(err)
		}
		var read segment.Segment
		if err := json.Unmarshal(b, &read); err != nil || !read.Equal(changed.Recorded()) {
			t.Errorf("with another %s, the record is read as %+v, %v", field, read, err)
		}
	})
	other := s
	other.Remotes, other.FDB, other.Neighbors, other.Partial = nil, nil, nil, true
	if !s.Recorded().Equal(other.Recorded()) {
		t.Error("segments that differ in tables have different records")
	}
}

func TestNamespacesThatMayAttach(t *testing.T) {
	open := lab
	open.AllowedNamespaces = []string{"blue"}
	all := lab
	all.AllowedNamespaces = []string{"*"}
	for _, tt := range []struct {
		segment   segment.Segment
		namespace string
		want      bool
	}{{lab, "default", true}, {lab, "blue", false}, {open, "blue", true}, {open, "red", false}, {all, "red", true}} {
		if got := tt.segment.Allows(tt.namespace); got != tt.want {
			t.Errorf("%v open to %s: %v", tt.segment.AllowedNamespaces, tt.namespace, got)
		}
	}
}
