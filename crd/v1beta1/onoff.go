package v1beta1

import (
	"encoding/json"
	"fmt"
)

// OnOff is on or off; empty where nothing is said.
type OnOff string

// The positions of a switch.
const (
	On  OnOff = "on"
	Off OnOff = "off"
)

// UnmarshalJSON takes "on" and "off", and the booleans that YAML 1.1, and so kubectl, makes of both where they are not quoted.
func (s *OnOff) UnmarshalJSON(b []byte) error {
	var value any
	if err := json.Unmarshal(b, &value); err != nil {
		return fmt.Errorf("a switch: %w", err)
	}
	switch value {
	case nil:
	case true, string(On):
		*s = On
	case false, string(Off):
		*s = Off
	default:
		return fmt.Errorf("%s is neither on nor off", b)
	}
	return nil
}
