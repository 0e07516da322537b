package workflow

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
)

// maxInterpolated bounds the result of Interpolate, in bytes.
const maxInterpolated = 1 << 20

// part is a piece of a template: literal text, or an expression.
type part struct {
	text   string
	isExpr bool
	start  int // of text, in characters from the template's beginning
}

// templateError is a template whose ${{ is not closed, or has nothing in it.
type templateError struct {
	start int // in characters
	msg   string
}

func (e *templateError) Error() string { return e.msg }

// split takes a template apart. The }} that ends an expression is the first
// one outside string literals and braces.
func split(s string) ([]part, *templateError) {
	var out []part
	chars := 0
	for {
		lit, rest, found := strings.Cut(s, "${{")
		if lit != "" {
			out = append(out, part{text: lit, start: chars})
		}
		if !found {
			return out, nil
		}
		chars += utf8.RuneCountInString(lit)
		n := exprEnd(rest)
		if n < 0 {
			return out, &templateError{chars, "${{ is not closed by }}"}
		}
		expr := rest[:n]
		lead := expr[:len(expr)-len(strings.TrimLeftFunc(expr, unicode.IsSpace))]
		trimmed := strings.TrimSpace(expr)
		if trimmed == "" {
			return out, &templateError{chars, "${{ }} is empty"}
		}
		out = append(out, part{text: trimmed, isExpr: true, start: chars + 3 + utf8.RuneCountInString(lead)})
		chars += 3 + utf8.RuneCountInString(expr) + 2
		s = rest[n+2:]
	}
}

// exprEnd is the offset of the }} that ends the expression s begins with, -1
// when there is none.
func exprEnd(s string) int {
	depth := 0
	for i := 0; i < len(s); {
		switch c := s[i]; c {
		case '\'', '"':
			i = stringEnd(s, i)
			continue
		case '{':
			depth++
		case '}':
			if depth == 0 {
				if strings.HasPrefix(s[i:], "}}") {
					return i
				}
			} else {
				depth--
			}
		}
		i++
	}
	return -1
}

// stringEnd is the offset behind the CEL string literal that begins at i.
func stringEnd(s string, i int) int {
	raw := i > 0 && (s[i-1] == 'r' || s[i-1] == 'R') ||
		i > 1 && (s[i-1]|0x20 == 'b' && s[i-2]|0x20 == 'r')
	quote := s[i : i+1]
	if triple := strings.Repeat(quote, 3); strings.HasPrefix(s[i:], triple) {
		quote = triple
	}
	for i += len(quote); i < len(s); i++ {
		if s[i] == '\\' && !raw {
			i++
		} else if strings.HasPrefix(s[i:], quote) {
			return i + len(quote)
		}
	}
	return len(s)
}

// Interpolate replaces every ${{ expression }} in s by its value: text as it
// is, numbers as they were spelled (1.20) or without a superfluous fraction,
// true, false, nothing for null, lists and maps as JSON. To get a literal ${{
// write ${{ '${{' }}. Errors wrap ErrInvalid.
func (c Contexts) Interpolate(s string) (string, error) {
	if !strings.Contains(s, "${{") {
		return s, nil
	}
	parts, terr := split(s)
	if terr != nil {
		return "", fmt.Errorf("%w: %s in %q", ErrInvalid, terr.msg, abbreviate(s))
	}
	var b strings.Builder
	vars := c.variables()
	for _, p := range parts {
		v := p.text
		if p.isExpr {
			var err error
			if v, err = c.text(p.text, vars); err != nil {
				return "", err
			}
		}
		if b.Len()+len(v) > maxInterpolated {
			return "", fmt.Errorf("%w: the result of interpolation is larger than %d bytes", ErrInvalid, maxInterpolated)
		}
		b.WriteString(v)
	}
	return b.String(), nil
}

// InterpolateEnv interpolates entries in order; each sees those before it, over
// c.Env, in the env context.
func (c Contexts) InterpolateEnv(env []KV) ([]KV, error) {
	if len(env) == 0 {
		return nil, nil
	}
	c.Env = maps.Clone(c.Env)
	if c.Env == nil {
		c.Env = map[string]string{}
	}
	out := make([]KV, len(env))
	for i, kv := range env {
		v, err := c.Interpolate(kv.Value)
		if err != nil {
			return nil, fmt.Errorf("env %s: %w", kv.Name, err)
		}
		out[i] = KV{kv.Name, v}
		c.Env[kv.Name] = v
	}
	return out, nil
}

// Condition evaluates the value of an if: a CEL expression of type bool, bare
// or in one ${{ }}. Empty is success(). An expression in which none of
// success(), failure(), cancelled() and always() occurs holds only when
// success() does too. Errors wrap ErrInvalid.
func (c Contexts) Condition(expr string) (bool, error) {
	success := c.Status == "" || c.Status == StatusSuccess
	expr, err := bareCondition(expr)
	if err != nil {
		return false, err
	}
	if expr == "" {
		return success, nil
	}
	p, err := programs.get(expr)
	if err != nil {
		return false, err
	}
	if !p.status && !success {
		return false, nil
	}
	v, err := p.eval(expr, c.variables())
	if err != nil {
		return false, err
	}
	b, ok := v.(types.Bool)
	if !ok {
		return false, invalidExpr(expr, fmt.Sprintf("a condition must be true or false, this is of type %s", v.Type().TypeName()))
	}
	return bool(b), nil
}

// bareCondition removes the ${{ }} that may surround a condition.
func bareCondition(s string) (string, error) {
	s = strings.TrimSpace(s)
	if !strings.Contains(s, "${{") || exprQuoted(s) {
		return s, nil
	}
	parts, terr := split(s)
	switch {
	case terr != nil:
		return "", fmt.Errorf("%w: %s in condition %q", ErrInvalid, terr.msg, abbreviate(s))
	case len(parts) == 1 && parts[0].isExpr:
		return parts[0].text, nil
	}
	return "", fmt.Errorf("%w: condition %q mixes ${{ }} with other text", ErrInvalid, abbreviate(s))
}

// exprQuoted reports whether every ${{ of a bare expression is inside one of
// its string literals.
func exprQuoted(s string) bool {
	for i := 0; i < len(s); {
		switch {
		case s[i] == '\'' || s[i] == '"':
			i = stringEnd(s, i)
		case strings.HasPrefix(s[i:], "${{"):
			return false
		default:
			i++
		}
	}
	return true
}

// variables binds the contexts for CEL.
func (c Contexts) variables() map[string]any {
	noText := types.String("")
	needs := make(map[string]any, len(c.Needs))
	for id, n := range c.Needs {
		needs[id] = map[string]any{"result": n.Result, "outputs": lenient(n.Outputs, noText)}
	}
	steps := make(map[string]any, len(c.Steps))
	for id, s := range c.Steps {
		steps[id] = map[string]any{"outcome": s.Outcome, "conclusion": s.Conclusion, "outputs": lenient(s.Outputs, noText)}
	}
	notRun := celEnv().CELTypeAdapter().NativeToValue(map[string]any{
		"outcome": StatusSkipped, "conclusion": StatusSkipped, "outputs": lenient(map[string]string{}, noText),
	})
	status := c.Status
	if status == "" {
		status = StatusSuccess
	}
	plain := func(v Values) map[string]any {
		if v == nil {
			return map[string]any{}
		}
		return v
	}
	return map[string]any{
		"event": plain(c.Event), "inputs": plain(c.Inputs), "matrix": lenient(plain(c.Matrix), types.NullValue),
		"ref": c.Ref, "sha": c.SHA, "repo": c.Repo,
		"needs": needs, "steps": lenient(steps, notRun), "env": lenient(plainEnv(c.Env), noText),
		statusVar: status,
		spellVar: func() any {
			return map[string]any{
				"event": respell(plain(c.Event)), "inputs": respell(plain(c.Inputs)),
				"matrix": lenient(respell(plain(c.Matrix)), noText),
			}
		},
	}
}

func plainEnv(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

// respell copies plain data with numbers as text, and null as none.
func respell(v any) any {
	switch v := v.(type) {
	case nil:
		return ""
	case json.Number:
		return v.String()
	case map[string]any:
		out := make(map[string]any, len(v))
		for k, e := range v {
			out[k] = respell(e)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, e := range v {
			out[i] = respell(e)
		}
		return out
	}
	return v
}

// text evaluates an expression and renders its value.
func (c Contexts) text(expr string, vars map[string]any) (string, error) {
	p, err := programs.get(expr)
	if err != nil {
		return "", err
	}
	if v, ok := c.lookup(p.path); ok {
		return render(v)
	}
	v, err := p.eval(expr, vars)
	if err != nil {
		return "", err
	}
	plain, err := plainValue(v)
	if err != nil {
		return "", invalidExpr(expr, err.Error())
	}
	return render(plain)
}

// lookup follows a plain reference in the contexts themselves, where numbers
// have their spelling.
func (c Contexts) lookup(path []string) (any, bool) {
	if path == nil {
		return nil, false
	}
	var v any
	switch path[0] {
	case "event":
		v = map[string]any(c.Event)
	case "inputs":
		v = map[string]any(c.Inputs)
	case "matrix":
		v = map[string]any(c.Matrix)
	}
	for _, name := range path[1:] {
		m, _ := v.(map[string]any)
		var ok bool
		if v, ok = m[name]; !ok {
			return nil, false
		}
	}
	return v, true
}

func (p *program) eval(expr string, vars map[string]any) (ref.Val, error) {
	v, _, err := p.prog.Eval(vars)
	if err != nil {
		return nil, invalidExpr(expr, celMessage(err.Error()))
	}
	return v, nil
}

// plainValue turns what CEL computed into plain data.
func plainValue(v ref.Val) (any, error) {
	switch v := v.(type) {
	case types.String:
		return string(v), nil
	case types.Bool:
		return bool(v), nil
	case types.Int:
		return json.Number(strconv.FormatInt(int64(v), 10)), nil
	case types.Uint:
		return json.Number(strconv.FormatUint(uint64(v), 10)), nil
	case types.Double:
		return json.Number(formatFloat(float64(v))), nil
	case types.Null:
		return nil, nil
	case types.Bytes:
		return string(v), nil
	case types.Timestamp:
		return v.Time.Format(time.RFC3339Nano), nil
	case types.Duration:
		return v.Duration.String(), nil
	case traits.Lister:
		out := []any{}
		for it := v.Iterator(); it.HasNext() == types.True; {
			e, err := plainValue(it.Next())
			if err != nil {
				return nil, err
			}
			out = append(out, e)
		}
		return out, nil
	case traits.Mapper:
		out := map[string]any{}
		for it := v.Iterator(); it.HasNext() == types.True; {
			key := it.Next()
			k, err := plainValue(key)
			if err != nil {
				return nil, err
			}
			e, err := plainValue(v.Get(key))
			if err != nil {
				return nil, err
			}
			out[fmt.Sprint(k)] = e
		}
		return out, nil
	}
	return nil, fmt.Errorf("a value of type %s cannot be turned into text", v.Type().TypeName())
}

// formatFloat avoids exponents for numbers of usual size.
func formatFloat(f float64) string {
	if abs := max(f, -f); abs != 0 && (abs < 1e-9 || abs >= 1e21) {
		return strconv.FormatFloat(f, 'g', -1, 64)
	}
	return strconv.FormatFloat(f, 'f', -1, 64)
}

// render is the text of plain data.
func render(v any) (string, error) {
	switch v := v.(type) {
	case nil:
		return "", nil
	case string:
		return v, nil
	case bool:
		return strconv.FormatBool(v), nil
	case json.Number:
		return v.String(), nil
	case float64:
		return formatFloat(v), nil
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return "", fmt.Errorf("%w: value has no JSON form: %w", ErrInvalid, err)
	}
	return strings.TrimSuffix(b.String(), "\n"), nil
}
