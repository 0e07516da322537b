package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/alecthomas/kong"
	"go.yaml.in/yaml/v4"

	"github.com/solstice-ci/solstice-go/internal/nearest"
)

// maxConfigBytes bounds the configuration file.
const maxConfigBytes = 1 << 20

// configFile holds the values of a configuration file by flag name.
type configFile struct {
	path   string
	values map[string]configValue
}

type configValue struct {
	value any
	line  int
}

// configFlag loads its file before flags are resolved.
type configFlag string

// BeforeResolve is kong's hook.
func (configFlag) BeforeResolve(k *kong.Kong, ctx *kong.Context, trace *kong.Path, s *sources) error {
	path := string(ctx.FlagValue(trace.Flag).(configFlag))
	data, err := readBounded(path)
	if err != nil {
		return &Problem{What: "cannot read the configuration file", Err: err}
	}
	if s.file, err = parseConfig(path, data, flagNames(k)); err != nil {
		return &Problem{What: "the configuration file is wrong", Err: err, Advice: "its keys are the names of flags; see --help"}
	}
	return nil
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // only read from
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err == nil && len(data) > maxConfigBytes {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxConfigBytes)
	}
	return data, err
}

// flagNames lists the flags that a file may set: all of every command.
func flagNames(k *kong.Kong) []string {
	var names []string
	for _, group := range k.Model.AllFlags(false) {
		for _, f := range group {
			names = append(names, f.Name)
		}
	}
	for _, leaf := range k.Model.Leaves(false) {
		for _, group := range leaf.AllFlags(false) {
			for _, f := range group {
				names = append(names, f.Name)
			}
		}
	}
	slices.Sort(names)
	return slices.DeleteFunc(slices.Compact(names), func(n string) bool {
		return n == "config" || n == "help" || n == "version"
	})
}

// parseConfig reports every wrong key at once.
func parseConfig(path string, data []byte, flags []string) (*configFile, error) {
	f := &configFile{path: path, values: map[string]configValue{}}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return f, nil
	} else if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: more than one YAML document", path)
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return f, nil
	}
	if root.Kind != yaml.MappingNode {
		return nil, fmt.Errorf("%s:%d: expected a mapping of flag names to values", path, root.Line)
	}
	var errs []error
	for i := 0; i+1 < len(root.Content); i += 2 {
		key, node := root.Content[i], root.Content[i+1]
		v, err := configNode(node)
		switch {
		case key.Kind != yaml.ScalarNode || !slices.Contains(flags, key.Value):
			err = fmt.Errorf("unknown key %q%s", key.Value, suggest(key.Value, flags))
		case f.values[key.Value].line != 0:
			err = fmt.Errorf("key %q is there already in line %d", key.Value, f.values[key.Value].line)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s:%d: %w", path, key.Line, err))
			continue
		}
		if v != nil {
			f.values[key.Value] = configValue{v, key.Line}
		}
	}
	return f, errors.Join(errs...)
}

// configNode keeps scalars as they are written and decodes lists and maps; nil
// means not set.
func configNode(n *yaml.Node) (any, error) {
	switch n.Kind {
	case yaml.ScalarNode:
		if n.Tag == "!!null" {
			return nil, nil
		}
		return n.Value, nil
	case yaml.SequenceNode:
		var v []any
		err := n.Decode(&v)
		return v, err
	case yaml.MappingNode:
		var v map[string]any
		err := n.Decode(&v)
		return v, err
	}
	return nil, errors.New("aliases are not supported")
}

// suggest finds the flag that a wrong key most resembles.
func suggest(key string, flags []string) string {
	if best := nearest.To(key, flags); best != "" {
		return fmt.Sprintf(" (did you mean %q?)", best)
	}
	return ""
}
