package workflow

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v4"
)

func compileSchema(t *testing.T) *jsonschema.Schema {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(Schema()))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	if err := c.AddResource(SchemaID, doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile(SchemaID)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// instance is a YAML file as a JSON Schema validator sees it; nil when it is
// not one document with text keys.
func instance(src []byte) any {
	var doc yaml.Node
	if err := yaml.Load(src, &doc); err != nil || len(doc.Content) != 1 {
		return nil
	}
	v := vetter{reporter: &reporter{src: newSource("", string(src))}, size: map[*yaml.Node]int{}, height: map[*yaml.Node]int{}, open: map[*yaml.Node]bool{}}
	v.vet(doc.Content[0], 1)
	if v.fatal {
		return nil
	}
	b, err := json.Marshal(plain(doc.Content[0]))
	if err != nil {
		return nil
	}
	inst, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		return nil
	}
	return inst
}

func TestSchemaIsCurrent(t *testing.T) {
	if flag.Lookup("update").Value.String() == "true" {
		if err := os.WriteFile("schema.json", Schema(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile("schema.json")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, Schema()) {
		t.Error("schema.json is not what Schema returns; go test -update writes it")
	}
}

// TestSchemaAndParser: good files pass both, and what the table alone refuses
// (keys, missing keys, kinds of values) the schema refuses too.
func TestSchemaAndParser(t *testing.T) {
	s := compileSchema(t)
	paths, err := filepath.Glob("testdata/*/*.yaml")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no files: %v", err)
	}
	structural := 0
	for _, p := range paths {
		src, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		inst := instance(src)
		if inst == nil {
			continue
		}
		_, diags := Parse(p, src)
		valid := s.Validate(inst)
		if strings.Contains(p, "good") && valid != nil {
			t.Errorf("%s: %v", p, valid)
		}
		for _, d := range diags {
			if strings.HasPrefix(d.Message, "unknown key") || strings.Contains(d.Message, " is missing ") || strings.Contains(d.Message, " must be a mapping") || strings.Contains(d.Message, " must be text") || strings.HasSuffix(d.Message, " is reserved") {
				structural++
				if valid == nil {
					t.Errorf("%s: the schema accepts: %s", p, d)
				}
			}
		}
	}
	if structural < 20 {
		t.Errorf("only %d structural errors seen", structural)
	}
}

// TestTable tries every key of every mapping in the table: a value that fits is
// accepted by parser and schema alike, the key with a letter more by neither,
// and a value of another kind by neither.
func TestTable(t *testing.T) {
	schema := compileSchema(t)
	accepted := func(v any) (parser, inSchema bool) {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		r, text, ok := checkText("w.yaml", b)
		if !ok {
			t.Fatal("bad text")
		}
		root := load(r, text)
		if root == nil {
			return false, schema.Validate(instance(b)) == nil
		}
		r.check(root, rootShape, "the workflow")
		return len(r.diags) == 0, schema.Validate(instance(b)) == nil
	}
	both := func(where string, v any, want bool) {
		t.Helper()
		if p, s := accepted(v); p != want || s != want {
			b, _ := json.Marshal(v)
			t.Errorf("%s: parser %v, schema %v, want %v: %s", where, p, s, want, b)
		}
	}
	keys := 0
	// wrap puts a value of the shape into a whole workflow.
	var walk func(s *shape, where string, wrap func(any) any)
	walk = func(s *shape, where string, wrap func(any) any) {
		both(where, wrap(sample(s)), true)
		if s.kind != kindAny {
			both(where+" of another kind", wrap(otherKind(s)), false)
		}
		switch s.kind {
		case kindOneOf:
			for _, a := range s.alts {
				if a.kind != kindText && a.kind != kindBool {
					walkInner(a, where, wrap, walk)
				} else {
					both(where, wrap(sample(a)), true)
				}
			}
		default:
			walkInner(s, where, wrap, walk)
		}
		if s.kind != kindMap {
			return
		}
		for _, f := range s.fields {
			keys++
			m := sample(s).(map[string]any)
			m[f.name+"x"] = sample(f.shape)
			if s.keys == nil {
				both(where+"."+f.name+"x", wrap(m), false)
			}
			if f.required {
				m := sample(s).(map[string]any)
				delete(m, f.name)
				both(where+" without "+f.name, wrap(m), false)
			}
		}
	}
	walk(rootShape, "", func(v any) any { return v })
	if keys < 40 {
		t.Errorf("only %d keys tried", keys)
	}
}

// walkInner goes on with the values inside a shape.
func walkInner(s *shape, where string, wrap func(any) any, walk func(*shape, string, func(any) any)) {
	switch s.kind {
	case kindList:
		walk(s.elem, where+"[]", func(v any) any { return wrap([]any{v}) })
	case kindMap:
		for _, f := range s.fields {
			walk(f.shape, where+"."+f.name, func(v any) any {
				m := sample(s).(map[string]any)
				m[f.name] = v
				return wrap(m)
			})
		}
		if s.keys != nil {
			walk(s.elem, where+".*", func(v any) any { return wrap(map[string]any{"some_key": v}) })
		}
	}
}

// sample is the least value that a shape accepts.
func sample(s *shape) any {
	switch s.kind {
	case kindText:
		if s.enum != nil {
			return s.enum[0]
		}
		return "text"
	case kindBool:
		return true
	case kindInt:
		return 1
	case kindDuration:
		return "30m"
	case kindList:
		return []any{sample(s.elem)}
	case kindMap:
		m := map[string]any{}
		for _, f := range s.fields {
			if f.required {
				m[f.name] = sample(f.shape)
			}
		}
		if s.min > 0 && len(m) == 0 {
			if s.keys != nil {
				m["some_key"] = sample(s.elem)
			} else {
				m[s.fields[0].name] = sample(s.fields[0].shape)
			}
		}
		return m
	case kindOneOf:
		return sample(s.alts[0])
	}
	return map[string]any{"any": []any{1, nil}}
}

// otherKind is a value that a shape does not accept.
func otherKind(s *shape) any {
	for _, v := range []any{map[string]any{"no_such_key": []any{map[string]any{}}}, []any{[]any{}}, "no such text", nil} {
		b, err := json.Marshal(v)
		if err != nil {
			panic(err)
		}
		var n yaml.Node
		if err := yaml.Load(b, &n); err != nil {
			panic(err)
		}
		if !s.accepts(n.Content[0]) {
			return v
		}
	}
	return []any{[]any{[]any{}}} // a list, but not of anything
}

// TestForeignAdvice: keys with advice are not keys, and advice that names a key
// names one of that mapping.
func TestForeignAdvice(t *testing.T) {
	var visit func(s *shape)
	seen := map[*shape]bool{}
	visit = func(s *shape) {
		if s == nil || seen[s] {
			return
		}
		seen[s] = true
		var names []string
		for _, f := range s.fields {
			names = append(names, f.name)
			visit(f.shape)
		}
		for k, advice := range s.foreign {
			if slices.Contains(names, k) {
				t.Errorf("%q is a key and has advice", k)
			}
			if advice != "" && !strings.Contains(advice, " ") && !slices.Contains(names, advice) {
				t.Errorf("advice for %q names %q, which is no key there", k, advice)
			}
		}
		visit(s.elem)
		for _, a := range s.alts {
			visit(a)
		}
	}
	visit(rootShape)
}

func TestNearest(t *testing.T) {
	keys := []string{"name", "runs-on", "needs", "steps", "timeout", "continue-on-error"}
	for got, want := range map[string]string{
		"naem": "name", "runs_on": "runs-on", "runson": "runs-on", "need": "needs", "step": "steps", "timeout-minutes": "timeout", "Timeout": "timeout",
		"xyz": "", "": "", "continueonerror": "continue-on-error", strings.Repeat("x", 100): "",
	} {
		if s := nearest(got, keys); s != want {
			t.Errorf("%q: %q, want %q", got, s, want)
		}
	}
}
