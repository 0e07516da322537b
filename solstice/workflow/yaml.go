package workflow

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
)

const (
	tagNull  = "!!null"
	tagBool  = "!!bool"
	tagInt   = "!!int"
	tagFloat = "!!float"
	tagStr   = "!!str"
	tagMerge = "!!merge"
)

// load reads YAML into nodes and refuses what no workflow needs and what could
// be used to exhaust memory. It returns nil after reporting why the file cannot
// be looked at any further.
func load(r *reporter, text string) *yaml.Node {
	l, err := yaml.NewLoader(strings.NewReader(text))
	if err != nil {
		r.at(Position{1, 1}, 1, "cannot read YAML: %v", err)
		return nil
	}
	var doc yaml.Node
	if err := l.Load(&doc); err != nil && !errors.Is(err, io.EOF) {
		r.syntax(err)
		return nil
	}
	if len(doc.Content) == 0 || doc.Content[0].Kind == yaml.ScalarNode && doc.Content[0].ShortTag() == tagNull {
		r.at(Position{1, 1}, 1, "the workflow is empty").
			hint("the smallest workflow is\njobs:\n  test:\n    steps:\n      - run: make test")
		return nil
	}
	var second yaml.Node
	switch err := l.Load(&second); {
	case err == nil:
		r.at(nodePos(&second), 1, "a second YAML document begins here").
			hint("a file holds one workflow; put further ones into %s/", Dir)
		return nil
	case !errors.Is(err, io.EOF):
		r.syntax(err)
		return nil
	}
	v := vetter{reporter: r, size: map[*yaml.Node]int{}, height: map[*yaml.Node]int{}, open: map[*yaml.Node]bool{}}
	root := doc.Content[0]
	v.vet(root, 1)
	if v.fatal {
		return nil
	}
	return root
}

// checkText finds bytes that YAML does not allow, for which its reader knows no
// position, and returns the text without a byte order mark.
func checkText(path string, b []byte) (*reporter, string, bool) {
	fail := func(src string, p Position, msg, hint string) (*reporter, string, bool) {
		r := &reporter{src: newSource(path, src)}
		r.at(p, 1, "%s", msg).Hint = hint
		return r, "", false
	}
	if len(b) > MaxFileSize {
		return fail("", Position{1, 1}, fmt.Sprintf("the file has %d bytes, at most %d are allowed", len(b), MaxFileSize), "")
	}
	b = bytes.TrimPrefix(b, []byte("\ufeff"))
	p := Position{1, 1}
	for i := 0; i < len(b); {
		c, n := utf8.DecodeRune(b[i:])
		switch {
		case c == utf8.RuneError && n == 1:
			return fail(strings.ToValidUTF8(string(b), "\ufffd"), p, "the file is not valid UTF-8", "save it in the encoding UTF-8")
		case c < ' ' && c != '\t' && c != '\n' && c != '\r', c >= 0x7f && c < 0xa0 && c != 0x85, c == 0xfeff, c == 0xfffe, c == 0xffff:
			return fail(string(b), p, fmt.Sprintf("character %U is not allowed in YAML", c), `in double quotes it can be written as an escape such as "\x1b"`)
		}
		i += n
		if c == '\n' || c == '\r' && (i == len(b) || b[i] != '\n') {
			p = Position{p.Line + 1, 1}
		} else {
			p.Column++
		}
	}
	text := string(b)
	return &reporter{src: newSource(path, text)}, text, true
}

// syntax reports an error of the YAML parser.
func (r *reporter) syntax(err error) {
	var le *yaml.LoadError
	var les *yaml.LoadErrors
	if errors.As(err, &les) && len(les.Errors) > 0 {
		le = les.Errors[0]
	}
	if le == nil && !errors.As(err, &le) {
		r.at(Position{1, 1}, 1, "not valid YAML: %v", err)
		return
	}
	p := Position{le.Mark.Line, le.Mark.Column}
	if c := (Position{le.ContextMark.Line, le.ContextMark.Column}); c.Line > 0 && (p.Line > len(r.src.lines) || strings.Contains(le.Message, "end of stream")) {
		p = c // where the unfinished thing began
	}
	msg := le.Message
	if le.ContextMsg != "" && le.ContextMsg != "while scanning for the next token" {
		msg = le.ContextMsg + ": " + msg
	}
	d := r.at(p, 1, "not valid YAML: %s", msg)
	if l := le.ContextMark.Line; l > 0 && l < p.Line {
		d.hint("what is unfinished began on line %d", l)
	}
	switch c := r.src.rune(p); {
	case c == '\t':
		d.Message, d.Hint = "not valid YAML: a tab in the indentation", "indent with spaces"
	case strings.Contains(le.Message, "mapping values are not allowed"):
		d.Hint = `a value that holds ": " needs quotes; otherwise check the indentation`
		if strings.Contains(d.Source, "${{") {
			d.Hint = `a value that holds ": ", also inside ${{ }}, needs quotes around the whole`
		}
	case c == '@' || c == '`' || c == '%' || c == '|' || c == '>':
		d.Hint = fmt.Sprintf("a value cannot begin with %q unless it is in quotes", c)
	case strings.Contains(le.Message, "unknown anchor"):
		d.Hint = "a value that begins with * needs quotes, unless it refers to an &anchor further up"
	}
}

// vetter walks all nodes once. Aliases are not followed but accounted for, so
// that later walks may follow them.
type vetter struct {
	*reporter
	size, height map[*yaml.Node]int // with aliases expanded; size saturates above MaxNodes
	open         map[*yaml.Node]bool
	fatal        bool
}

func (v *vetter) fail(n *yaml.Node, format string, args ...any) *Diagnostic {
	v.fatal = true
	return v.at(nodePos(n), nodeWidth(n), format, args...)
}

func (v *vetter) vet(n *yaml.Node, depth int) {
	if v.fatal {
		return
	}
	if depth > MaxDepth {
		v.fail(n, "nested more than %d deep", MaxDepth)
		return
	}
	switch n.Kind {
	case yaml.AliasNode:
		switch {
		case v.open[n.Alias]:
			v.fail(n, "alias *%s refers to what it is part of", n.Value)
		case depth+v.height[n.Alias] > MaxDepth:
			v.fail(n, "nested more than %d deep", MaxDepth)
		}
		v.size[n], v.height[n] = v.size[n.Alias], v.height[n.Alias]
		return
	case yaml.ScalarNode:
		if len(n.Value) > MaxScalar {
			v.fail(n, "a text of %d bytes, at most %d are allowed", len(n.Value), MaxScalar).
				hint("put a long script into a file of the repository")
		}
	}
	switch tag := n.ShortTag(); tag {
	case tagNull, tagBool, tagInt, tagFloat, tagStr, tagMerge, "!!timestamp", "!!seq", "!!map":
	default:
		v.fail(n, "the YAML tag %s is not supported", tag)
	}
	v.open[n] = true
	size, height := 1, 0
	first := map[string]*yaml.Node{}
	for i, c := range n.Content {
		v.vet(c, depth+1)
		size = min(size+v.size[c], MaxNodes+1)
		height = max(height, 1+v.height[c])
		if size > MaxNodes && !v.fatal {
			v.fail(c, "more than %d values, with aliases expanded", MaxNodes)
		}
		if n.Kind != yaml.MappingNode || i%2 == 1 {
			continue
		}
		switch k := deref(c); {
		case k.Kind == yaml.ScalarNode && k.ShortTag() == tagMerge:
			v.fail(c, "merge keys (<<) are not supported").hint("use an alias for a whole value, or repeat the keys")
		case k.Kind != yaml.ScalarNode:
			v.fail(c, "a key must be text, not %s", describe(k))
		case k.ShortTag() != tagStr:
			v.fail(c, "a key must be text, not %s", describe(k)).hint("put it in quotes: %q", k.Value)
		case first[k.Value] != nil:
			v.at(nodePos(c), nodeWidth(c), "key %q is a duplicate", k.Value).
				hint("it is set on line %d already", first[k.Value].Line)
		default:
			first[k.Value] = c
		}
	}
	delete(v.open, n)
	v.size[n], v.height[n] = size, height
}

// deref follows an alias.
func deref(n *yaml.Node) *yaml.Node {
	for n != nil && n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	return n
}

// entries yields the keys and values of a mapping, of a duplicate key the
// first, nothing for any other node.
func entries(n *yaml.Node) iter.Seq2[*yaml.Node, *yaml.Node] {
	return func(yield func(k, v *yaml.Node) bool) {
		n := deref(n)
		if n == nil || n.Kind != yaml.MappingNode {
			return
		}
		seen := map[string]bool{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			k := deref(n.Content[i])
			if seen[k.Value] {
				continue
			}
			seen[k.Value] = true
			if !yield(k, deref(n.Content[i+1])) {
				return
			}
		}
	}
}

// items yields the items of a sequence, nothing for any other node.
func items(n *yaml.Node) iter.Seq2[int, *yaml.Node] {
	return func(yield func(int, *yaml.Node) bool) {
		n := deref(n)
		if n == nil || n.Kind != yaml.SequenceNode {
			return
		}
		for i, c := range n.Content {
			if !yield(i, deref(c)) {
				return
			}
		}
	}
}

// get is the value of a key, nil when it is absent.
func get(n *yaml.Node, key string) *yaml.Node {
	for k, v := range entries(n) {
		if k.Value == key {
			return v
		}
	}
	return nil
}

func isScalar(n *yaml.Node) bool {
	return n != nil && n.Kind == yaml.ScalarNode && n.ShortTag() != tagNull
}

// text of a scalar as written, "" for any other node.
func text(n *yaml.Node) string {
	if !isScalar(n) {
		return ""
	}
	return n.Value
}

// describe says what a node is, for "must be X, not Y".
func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	switch n.ShortTag() {
	case tagNull:
		return "nothing"
	case tagBool:
		return "a boolean"
	case tagInt, tagFloat:
		return "a number"
	}
	return "text"
}

func nodePos(n *yaml.Node) Position { return Position{n.Line, n.Column} }

// nodeWidth is how much of its first line a node takes, as far as it is known.
func nodeWidth(n *yaml.Node) int {
	w := utf8.RuneCountInString(n.Value)
	switch {
	case n.Kind == yaml.AliasNode:
		return w + 1
	case n.Kind != yaml.ScalarNode || strings.Contains(n.Value, "\n") || n.Style&yaml.FoldedStyle != 0:
		return 1
	case n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle) != 0:
		return w + 2
	}
	return max(w, 1)
}
