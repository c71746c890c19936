package sidecar

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"
)

// Sources are where a configuration comes from. A key in Flags overrides the same in Env, and that the one in File.
type Sources struct {
	File  []byte            // YAML; nil: there is none
	Env   map[string]string // the process's environment
	Flags map[string]string // by key

	Hostname  string // the default name of the pod
	Namespace string // of the pod's service account; empty: not known
}

const (
	envPrefix = "KL_"

	defaultTimeout = 30 * time.Second
)

// Read reads a configuration. Errors name the key: those of unknown keys in the file, and of values that do not fit. An
// empty environment variable counts as unset.
func Read(s Sources) (Config, error) {
	c := Config{
		LogLevel: "INFO", HTTPAddress: ":8181", Namespace: s.Namespace, Pod: s.Hostname, Discovery: UnicastDiscovery,
		VXLAN: VXLAN{Interface: "kubelan", VNI: 6969, Port: 4789, MTU: -1},
		Hooks: Hooks{Timeout: Duration(defaultTimeout)},
	}
	values, err := s.values()
	if err != nil {
		return c, err
	}
	var errs []error
	for _, k := range keys {
		v := values[k.name]
		switch {
		case len(v) == 0:
		case len(v) > 1 && !k.list:
			errs = append(errs, fmt.Errorf("%s: has %d values, must have one", k.name, len(v)))
		default:
			if err := k.set(&c, v); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", k.name, err))
			}
		}
		delete(values, k.name)
	}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		errs = append(errs, fmt.Errorf("%s: unknown key; known are %s", name, knownKeys()))
	}
	if len(errs) == 0 {
		errs = append(errs, c.check())
	}
	return c, joinErrors(errs)
}

// values returns the values of all keys that are set.
func (s Sources) values() (map[string][]string, error) {
	values, err := fileValues(s.File)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		if text := s.Env[envPrefix+strings.ToUpper(strings.ReplaceAll(k.name, ".", "_"))]; text != "" {
			if values[k.name], err = textValues(k, text); err != nil {
				return nil, fmt.Errorf("environment: %s: %w", k.name, err)
			}
		}
		if text := s.Flags[k.name]; text != "" {
			values[k.name] = []string{text}
		}
	}
	return values, nil
}

// joinErrors joins errors in one line.
func joinErrors(errs []error) error {
	var texts []string
	for _, err := range errs {
		if err != nil {
			texts = append(texts, err.Error())
		}
	}
	if len(texts) == 0 {
		return nil
	}
	return errors.New(strings.Join(texts, "; "))
}

// fileValues returns the values in a YAML file by key. It accepts any key. As with kubelan, letter case does not matter
// in keys.
func fileValues(file []byte) (map[string][]string, error) {
	values := map[string][]string{}
	text, err := yaml.YAMLToJSONStrict(file)
	if err != nil {
		return nil, fmt.Errorf("is not YAML: %s", strings.Join(strings.Fields(err.Error()), " "))
	}
	if len(bytes.TrimSpace(text)) == 0 || string(text) == "null" {
		return values, nil
	}
	var tree map[string]any
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber() // keeps numbers as written: 6969 must not become 6.969e+03
	if err := d.Decode(&tree); err != nil {
		return nil, errors.New("is not a list of keys and values")
	}
	return values, flatten(values, "", tree)
}

// flatten adds the values in a tree of keys. The name of a nested key has a dot before each part but the first.
func flatten(values map[string][]string, prefix string, tree map[string]any) error {
	for name, v := range tree {
		name = prefix + strings.ToLower(name)
		var items []any
		switch v := v.(type) {
		case map[string]any:
			if err := flatten(values, name+".", v); err != nil {
				return err
			}
			continue
		case []any:
			items = v
		case nil:
		default:
			items = []any{v}
		}
		for _, item := range items {
			switch item.(type) {
			case nil, []any, map[string]any:
				return fmt.Errorf("%s: has something other than values", name)
			}
			values[name] = append(values[name], fmt.Sprint(item))
		}
		if isKnown(name) && len(items) == 1 && items[0] == "" {
			delete(values, name) // an empty value counts as unset
		} else if !isKnown(name) && len(items) == 0 {
			values[name] = nil // so that Read reports it
		}
	}
	return nil
}

// textValues returns the values of an environment variable. A list has commas or is written as in YAML. evpn.peers has
// spaces instead, because a peer contains commas.
func textValues(k key, text string) ([]string, error) {
	if !k.list {
		return []string{text}, nil
	}
	if strings.HasPrefix(text, "[") {
		values, err := fileValues([]byte(k.name + ": " + text))
		return values[k.name], err
	}
	if k.name == peersKey {
		return strings.Fields(text), nil
	}
	var values []string
	for v := range strings.SplitSeq(text, ",") {
		values = append(values, strings.TrimSpace(v))
	}
	return values, nil
}
