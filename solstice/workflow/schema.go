package workflow

import (
	"encoding/json"
	"slices"
)

// SchemaID identifies the JSON Schema of workflow files.
const SchemaID = "https://solstice-ci.org/schema/workflow.v1.json"

// Schema is the JSON Schema (draft 2020-12) of workflow files, for editors. It
// describes structure; what needs more, such as references between jobs and
// expressions, only Parse checks.
func Schema() []byte {
	g := schemaGenerator{defs: map[string]any{}}
	root := g.body(rootShape)
	root["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	root["$id"] = SchemaID
	root["title"] = "Solstice workflow"
	root["$defs"] = g.defs
	b, err := json.MarshalIndent(root, "", "  ")
	if err != nil {
		panic("workflow: schema: " + err.Error()) // made of strings, numbers and maps
	}
	return append(b, '\n')
}

type schemaGenerator struct{ defs map[string]any }

// of is the schema of a shape, a reference where it has a name.
func (g *schemaGenerator) of(s *shape) map[string]any {
	if s.def == "" {
		return g.body(s)
	}
	if _, ok := g.defs[s.def]; !ok {
		g.defs[s.def] = nil // a recursive shape would end here
		g.defs[s.def] = g.body(s)
	}
	return map[string]any{"$ref": "#/$defs/" + s.def}
}

func (g *schemaGenerator) body(s *shape) map[string]any {
	out := map[string]any{}
	if s.doc != "" {
		out["description"] = s.doc
	}
	switch s.kind {
	case kindText:
		out["type"] = []string{"string", "number", "boolean"}
		switch {
		case s.enum != nil:
			delete(out, "type")
			out["enum"] = s.enum
		case s.word != nil:
			out["pattern"] = s.word.re().String()
		}
	case kindBool:
		out["type"] = "boolean"
	case kindInt:
		out["type"], out["minimum"] = "integer", 0
	case kindDuration:
		out["anyOf"] = []any{
			map[string]any{"type": "integer", "minimum": 1, "maximum": int(MaxTimeout.Minutes()), "description": "Minutes."},
			map[string]any{"type": "string", "pattern": durationRE().String()},
		}
		out["examples"] = []any{"30m", "1h30m", 90}
	case kindList:
		out["type"], out["items"] = "array", g.of(s.elem)
		bounds(out, s, "Items")
	case kindMap:
		g.mapping(out, s)
	case kindOneOf:
		var alts []any
		for _, a := range s.alts {
			alts = append(alts, g.of(a))
		}
		out["anyOf"] = alts
	}
	return out
}

func (g *schemaGenerator) mapping(out map[string]any, s *shape) {
	out["type"] = "object"
	if s.null {
		out["type"] = []string{"object", "null"}
	}
	props := map[string]any{}
	var required []string
	for _, f := range s.fields {
		prop := g.of(f.shape)
		if f.doc != "" {
			prop["description"] = f.doc
		}
		props[f.name] = prop
		if f.required {
			required = append(required, f.name)
		}
	}
	if len(props) > 0 {
		out["properties"] = props
	}
	if required != nil {
		slices.Sort(required)
		out["required"] = required
	}
	if s.keys == nil {
		out["additionalProperties"] = false
		bounds(out, s, "Properties")
		return
	}
	out["additionalProperties"] = g.of(s.elem)
	names := map[string]any{"pattern": s.keys.re().String()}
	if s.keys.not != nil {
		names["not"] = map[string]any{"pattern": s.keys.not().String()}
	}
	out["propertyNames"] = names
	bounds(out, s, "Properties")
}

func bounds(out map[string]any, s *shape, what string) {
	if s.min > 0 {
		out["min"+what] = s.min
	}
	if s.max > 0 {
		out["max"+what] = s.max
	}
}
