package workflow

import (
	"strings"
	"unicode"

	"go.yaml.in/yaml/v4"
)

// source is the text of a file, for diagnostics.
type source struct {
	path  string
	lines [][]rune // without line ends; at least one
}

func newSource(path string, text string) *source {
	s := &source{path: path}
	text = strings.ReplaceAll(text, "\r\n", "\n")
	text = strings.ReplaceAll(text, "\r", "\n")
	for l := range strings.SplitSeq(strings.TrimSuffix(text, "\n"), "\n") {
		s.lines = append(s.lines, []rune(l))
	}
	return s
}

// rune at p; '\n' at the end of a line, 0 at the end of the file.
func (s *source) rune(p Position) rune {
	if p.Line < 1 || p.Column < 1 || p.Line > len(s.lines) {
		return 0
	}
	if line := s.lines[p.Line-1]; p.Column <= len(line) {
		return line[p.Column-1]
	}
	if p.Line == len(s.lines) {
		return 0
	}
	return '\n'
}

func (s *source) next(p Position) Position {
	if p.Line <= len(s.lines) && p.Column <= len(s.lines[p.Line-1]) {
		return Position{p.Line, p.Column + 1}
	}
	return Position{p.Line + 1, 1}
}

// locate maps every character of a scalar's value to its place in the file,
// with one more entry for the end. It walks the source and the value side by
// side: white space matches white space of any length (indentation, folding),
// escapes match what they stand for. Where they part, the rest gets the
// scalar's own position.
func (s *source) locate(n *yaml.Node) []Position {
	value := []rune(n.Value)
	p := Position{n.Line, n.Column}
	for r := s.rune(p); r == '!' || r == '&'; r = s.rune(p) { // tag, anchor
		for r := s.rune(p); r != 0 && !unicode.IsSpace(r); r = s.rune(p) {
			p = s.next(p)
		}
		p = s.skipSpace(p)
	}
	switch {
	case n.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0:
		p = Position{p.Line + 1, 1} // after the header
	case n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle) != 0:
		p = s.next(p)
	}
	out := make([]Position, 0, len(value)+1)
	for i := 0; i < len(value); {
		if unicode.IsSpace(value[i]) {
			start := p
			p = s.skipBlank(p, n.Style)
			for ; i < len(value) && unicode.IsSpace(value[i]); i++ {
				out = append(out, start)
				if next := s.next(start); before(next, p) {
					start = next
				}
			}
			continue
		}
		if len(out) == 0 || before(out[len(out)-1], p) || i == 0 {
			p = s.skipIndent(p, n.Style)
		}
		decoded, end := s.unescape(p, n.Style)
		if decoded != value[i] {
			break
		}
		out = append(out, p)
		p = end
		i++
	}
	if len(out) < len(value) {
		p = Position{n.Line, n.Column}
	}
	for len(out) <= len(value) {
		out = append(out, p)
	}
	return out
}

func before(a, b Position) bool {
	return a.Line < b.Line || a.Line == b.Line && a.Column < b.Column
}

func (s *source) skipSpace(p Position) Position {
	for r := s.rune(p); r != 0 && unicode.IsSpace(r); r = s.rune(p) {
		p = s.next(p)
	}
	return p
}

// skipBlank passes white space, and escapes that stand for it.
func (s *source) skipBlank(p Position, style yaml.Style) Position {
	for {
		r := s.rune(p)
		if r == 0 {
			return p
		}
		decoded, end := s.unescape(p, style)
		if !unicode.IsSpace(decoded) {
			return p
		}
		p = end
	}
}

// skipIndent passes what contributes nothing to a value: the indentation of a
// block scalar's line, and an escaped line end with the indentation after it.
func (s *source) skipIndent(p Position, style yaml.Style) Position {
	if style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0 && p.Column == 1 {
		return s.skipSpace(p)
	}
	for style&yaml.DoubleQuotedStyle != 0 && s.rune(p) == '\\' && s.rune(s.next(p)) == '\n' {
		p = s.skipSpace(s.next(p))
	}
	return p
}

// unescape is the character at p of a scalar in the given style, and where the
// next one begins.
func (s *source) unescape(p Position, style yaml.Style) (rune, Position) {
	r, next := s.rune(p), s.next(p)
	switch {
	case r == '\'' && style&yaml.SingleQuotedStyle != 0:
		return r, s.next(next)
	case r != '\\' || style&yaml.DoubleQuotedStyle == 0:
		return r, next
	}
	r, next = s.rune(next), s.next(next)
	digits := 0
	switch r {
	case 'x':
		digits = 2
	case 'u':
		digits = 4
	case 'U':
		digits = 8
	case 'n', 'N', 'L', 'P':
		return '\n', next
	case 't':
		return '\t', next
	case 'r', 'v', 'f', '_':
		return ' ', next
	case '0':
		return 0, next
	case 'a':
		return '\a', next
	case 'b':
		return '\b', next
	case 'e':
		return 0x1b, next
	}
	if digits == 0 {
		return r, next
	}
	var v rune
	for range digits {
		d := s.rune(next)
		switch {
		case d >= '0' && d <= '9':
			v = v<<4 | (d - '0')
		case d|0x20 >= 'a' && d|0x20 <= 'f':
			v = v<<4 | ((d | 0x20) - 'a' + 10)
		default:
			return unicode.ReplacementChar, next
		}
		next = s.next(next)
	}
	return v, next
}
