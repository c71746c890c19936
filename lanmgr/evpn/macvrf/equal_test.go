package macvrf_test

import (
	"net/netip"
	"reflect"
	"testing"

	"github.com/k8slan/k8slan/lanmgr/evpn/macvrf"
)

// Each field counts in the Equal methods, which compare field by field.
func TestEqualComparesEachField(t *testing.T) {
	checkEqual(t, macvrf.LAN.Equal)
	checkEqual(t, macvrf.Route.Equal)
}

// checkEqual changes each field of a T in turn, those of embedded structs included, and expects equal to notice.
func checkEqual[T any](t *testing.T, equal func(a, b T) bool) {
	t.Helper()
	var zero T
	if !equal(zero, zero) {
		t.Errorf("two zero values of %T differ", zero)
	}
	for _, field := range reflect.VisibleFields(reflect.TypeFor[T]()) {
		if field.Anonymous {
			continue // its fields are visited
		}
		set := func(n byte) (v T) {
			fill(t, field.Name, reflect.ValueOf(&v).Elem().FieldByIndex(field.Index), n)
			return v
		}
		for _, pair := range [][2]T{{zero, set(1)}, {set(1), zero}, {set(1), set(2)}} {
			if field.Type.Kind() == reflect.Bool && reflect.DeepEqual(pair[0], pair[1]) {
				continue // there is no third value
			}
			if equal(pair[0], pair[1]) {
				t.Errorf("%T.Equal ignores %s: %+v and %+v are equal", zero, field.Name, pair[0], pair[1])
			}
		}
		if !equal(set(1), set(1)) {
			t.Errorf("two copies of %+v differ", set(1))
		}
	}
}

// fill sets a field to a value that differs for each n, and is not zero.
func fill(t *testing.T, name string, v reflect.Value, n byte) {
	t.Helper()
	if v.Type() == reflect.TypeFor[netip.Addr]() {
		v.Set(reflect.ValueOf(netip.AddrFrom4([4]byte{192, 0, 2, n})))
		return
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Uint8, reflect.Uint16, reflect.Uint32:
		v.SetUint(uint64(n))
	case reflect.Array:
		fill(t, name, v.Index(v.Len()-1), n)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(t, name, v.Index(1), n)
	default:
		t.Fatalf("field %s has a type that this test cannot fill: %s", name, v.Type())
	}
}
