package workflow

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"
)

// Matrix multiplies a job: one per combination of values.
type Matrix struct {
	Axes    []Axis   // in the file's order
	Include []Values // see Combinations
	Exclude []Values
	keys    []string // of axes, then of includes, in order of appearance
}

// Axis is one key of a matrix and its values.
type Axis struct {
	Key    string
	Values []any // plain data as in Values
}

// number reads a number as JSON spells it; what YAML also takes for one (0x1F,
// 1_000, .inf, 010) stays text.
func number(s string) (json.Number, bool) {
	if !json.Valid([]byte(s)) || s == "" || s[0] != '-' && (s[0] < '0' || s[0] > '9') {
		return "", false
	}
	if _, err := strconv.ParseFloat(s, 64); err != nil || len(s) > 64 {
		return "", false // out of range
	}
	return json.Number(s), true
}

// plain turns a node into plain data, numbers as spelled.
func plain(n *yaml.Node) any {
	n = deref(n)
	switch n.Kind {
	case yaml.MappingNode:
		m := map[string]any{}
		for k, v := range entries(n) {
			m[k.Value] = plain(v)
		}
		return m
	case yaml.SequenceNode:
		l := make([]any, 0, len(n.Content))
		for _, v := range items(n) {
			l = append(l, plain(v))
		}
		return l
	}
	switch n.ShortTag() {
	case tagNull:
		return nil
	case tagBool:
		return strings.EqualFold(n.Value, "true")
	case tagInt, tagFloat:
		if v, ok := number(n.Value); ok {
			return v
		}
	}
	return n.Value
}

func (p *fileParser) matrix(n *yaml.Node) *Matrix {
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	m := &Matrix{}
	addKey := func(k string) {
		if !slices.Contains(m.keys, k) {
			m.keys = append(m.keys, k)
		}
	}
	p.refuseInMatrix(n)
	whole := len(n.Content) > 0 // the table found nothing missing in it
	for k, v := range entries(n) {
		if v.Kind != yaml.SequenceNode || len(v.Content) == 0 {
			whole = false
			continue
		}
		if k.Value == "include" || k.Value == "exclude" {
			continue
		}
		a := Axis{Key: k.Value}
		for _, item := range items(v) {
			val := plain(item)
			if slices.ContainsFunc(a.Values, func(o any) bool { return reflect.DeepEqual(o, val) }) {
				p.at(nodePos(item), nodeWidth(item), "value %s of matrix key %q is a duplicate", show(val), a.Key)
			}
			a.Values = append(a.Values, val)
		}
		addKey(a.Key)
		m.Axes = append(m.Axes, a)
	}
	tuples := func(key string) (vals []Values, nodes []*yaml.Node) {
		for _, item := range items(get(n, key)) {
			if v, ok := plain(item).(map[string]any); ok {
				vals, nodes = append(vals, v), append(nodes, item)
			}
		}
		return vals, nodes
	}
	var includes, excludes []*yaml.Node
	m.Include, includes = tuples("include")
	m.Exclude, excludes = tuples("exclude")
	for _, item := range includes {
		for k := range entries(item) {
			addKey(k.Value)
		}
	}
	if m.size() > MaxCombinations {
		p.at(nodePos(n), 1, "the matrix has more than %d combinations", MaxCombinations)
		return m
	}
	p.checkExcludes(m, excludes)
	switch total := len(m.Combinations()); {
	case total == 0 && whole:
		p.at(nodePos(n), 1, "the matrix leaves no combination")
	case total > MaxCombinations:
		p.at(nodePos(n), 1, "the matrix has %d combinations, at most %d are allowed", total, MaxCombinations)
	}
	return m
}

// checkExcludes reports those that leave nothing out; nodes are parallel to
// m.Exclude.
func (p *fileParser) checkExcludes(m *Matrix, nodes []*yaml.Node) {
	axes, all := m.axisKeys(), m.product()
	for i, e := range nodes {
		known := true
		for k := range entries(e) {
			if !slices.Contains(axes, k.Value) {
				known = false
				p.at(nodePos(k), nodeWidth(k), "exclude names %q, which is not a key of the matrix", k.Value).suggest(k.Value, axes)
			}
		}
		if known && !slices.ContainsFunc(all, func(c Values) bool { return subset(m.Exclude[i], c) }) {
			p.warn(nodePos(e), 1, "this exclude fits no combination")
		}
	}
}

// refuseInMatrix reports expressions, which a matrix does not evaluate.
func (p *fileParser) refuseInMatrix(n *yaml.Node) {
	n = deref(n)
	if n.Kind == yaml.ScalarNode {
		p.refuseExpressions(n, "a matrix")
		return
	}
	for _, v := range items(n) {
		p.refuseInMatrix(v)
	}
	for _, v := range entries(n) {
		p.refuseInMatrix(v)
	}
}

func (m *Matrix) axisKeys() []string {
	keys := make([]string, len(m.Axes))
	for i, a := range m.Axes {
		keys[i] = a.Key
	}
	return keys
}

// size is the number of combinations of the axes, or MaxCombinations+1 when it
// is larger.
func (m *Matrix) size() int {
	if len(m.Axes) == 0 {
		return 0
	}
	n := 1
	for _, a := range m.Axes {
		if n *= len(a.Values); n > MaxCombinations {
			return MaxCombinations + 1
		}
	}
	return n
}

// product is every combination of the axes, the last axis varying fastest.
func (m *Matrix) product() []Values {
	if len(m.Axes) == 0 {
		return nil
	}
	out := []Values{{}}
	for _, a := range m.Axes {
		next := make([]Values, 0, len(out)*len(a.Values))
		for _, base := range out {
			for _, v := range a.Values {
				c := make(Values, len(m.Axes))
				for k, x := range base {
					c[k] = x
				}
				c[a.Key] = v
				next = append(next, c)
			}
		}
		out = next
	}
	return out
}

// Combinations are the values of each job, in declared order with the last axis
// varying fastest, as on GitHub: the product of the axes, without those that
// have all values of an exclude; then each include adds its values to every
// combination of axes whose axis values it does not contradict, or, when there
// is none, is a combination of its own. Numbers are the same when spelled the
// same.
func (m *Matrix) Combinations() []Values {
	var combos []Values
	for _, c := range m.product() {
		if !slices.ContainsFunc(m.Exclude, func(e Values) bool { return subset(e, c) }) {
			combos = append(combos, c)
		}
	}
	fromAxes := len(combos)
	axes := m.axisKeys()
	for _, inc := range m.Include {
		added := false
		for i := range fromAxes {
			c := combos[i]
			fits := true
			for _, k := range axes {
				if v, ok := inc[k]; ok && !reflect.DeepEqual(v, c[k]) {
					fits = false
				}
			}
			if fits {
				added = true
				for k, v := range inc {
					c[k] = v
				}
			}
		}
		if !added {
			c := make(Values, len(inc))
			for k, v := range inc {
				c[k] = v
			}
			combos = append(combos, c)
		}
	}
	return combos
}

func subset(part, whole Values) bool {
	for k, v := range part {
		if w, ok := whole[k]; !ok || !reflect.DeepEqual(v, w) {
			return false
		}
	}
	return true
}

// label is a combination for people: "go 1.26, os linux".
func (m *Matrix) label(c Values) string {
	var out []string
	for _, k := range m.keys {
		if v, ok := c[k]; ok {
			out = append(out, fmt.Sprintf("%s %s", k, show(v)))
		}
	}
	return strings.Join(out, ", ")
}

func show(v any) string {
	s, err := render(v)
	if err != nil {
		return fmt.Sprint(v)
	}
	return abbreviate(s)
}
