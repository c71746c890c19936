package v1beta1

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// IPAM is a CNI IPAM section: the name of an IPAM plugin and that plugin's own keys, which are kept as they were
// written.
type IPAM struct {
	// Type is the name of the IPAM plugin, such as host-local, static, dhcp or whereabouts.
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:XValidation:rule="self.matches('^[A-Za-z0-9_][A-Za-z0-9_.-]*$')",message="ipam.type is the name of an IPAM plugin in the nodes' CNI directory, such as host-local or static"
	Type string `json:"type"`

	// Section is the whole section as compact JSON, type included.
	Section json.RawMessage `json:"-"`
}

// UnmarshalJSON keeps the whole section. It fails if the section is not a JSON object.
func (i *IPAM) UnmarshalJSON(b []byte) error {
	var head struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return fmt.Errorf("IPAM section: %w", err)
	}
	var section bytes.Buffer
	if err := json.Compact(&section, b); err != nil {
		return fmt.Errorf("IPAM section: %w", err)
	}
	i.Type, i.Section = head.Type, section.Bytes()
	return nil
}

// MarshalJSON returns the section as it was read.
func (i IPAM) MarshalJSON() ([]byte, error) {
	if i.Section == nil {
		return json.Marshal(map[string]string{"type": i.Type})
	}
	return i.Section, nil
}
