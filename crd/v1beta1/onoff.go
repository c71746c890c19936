package v1beta1

import (
	"encoding/json"
	"fmt"
)

// OnOff is "on" or "off". It is empty if the field is missing.
type OnOff string

// The values of OnOff.
const (
	On  OnOff = "on"
	Off OnOff = "off"
)

// UnmarshalJSON accepts "on" and "off", and true and false. YAML 1.1, which kubectl reads, turns on and off without
// quotes into these booleans.
func (o *OnOff) UnmarshalJSON(b []byte) error {
	var value any
	if err := json.Unmarshal(b, &value); err != nil {
		return fmt.Errorf("on or off: %w", err)
	}
	switch value {
	case nil:
	case true, string(On):
		*o = On
	case false, string(Off):
		*o = Off
	default:
		return fmt.Errorf("%s is neither on nor off", b)
	}
	return nil
}
