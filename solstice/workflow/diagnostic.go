package workflow

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Severity of a diagnostic.
type Severity string

// Severities.
const (
	SeverityError   Severity = "error"
	SeverityWarning Severity = "warning"
)

// Diagnostic is one thing to say about a workflow file. Lines and columns
// count from 1; columns are characters and EndColumn is exclusive.
type Diagnostic struct {
	Path      string   `json:"path"`
	Line      int      `json:"line"`
	Column    int      `json:"column"`
	EndColumn int      `json:"end_column"`
	Severity  Severity `json:"severity"`
	Message   string   `json:"message"`
	Allowed   []string `json:"allowed,omitempty"` // what may stand there
	Hint      string   `json:"hint,omitempty"`    // advice; may have several lines
	Source    string   `json:"source,omitempty"`  // the line, without its end
}

// maxShown bounds a source line in text output, in characters.
const maxShown = 160

// String renders the diagnostic as a compiler would: place and message, the
// source line, a caret, advice. It ends with a newline.
func (d Diagnostic) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s:%d:%d: %s: %s\n", d.Path, d.Line, d.Column, d.Severity, d.Message)
	if d.Source != "" {
		line, pad, width := d.window()
		num := strconv.Itoa(d.Line)
		gutter := strings.Repeat(" ", len(num))
		fmt.Fprintf(&b, " %s | %s\n %s | %s%s\n", num, line, gutter, pad, strings.Repeat("^", width))
	}
	if len(d.Allowed) > 0 {
		fmt.Fprintf(&b, "   = allowed: %s\n", strings.Join(d.Allowed, ", "))
	}
	if d.Hint != "" {
		lines := strings.Split(d.Hint, "\n")
		fmt.Fprintf(&b, "   = help: %s\n", lines[0])
		for _, l := range lines[1:] {
			fmt.Fprintf(&b, "           %s\n", l)
		}
	}
	return b.String()
}

// window returns the part of the source line to show, what to print before the
// carets so that they line up (tabs stay tabs), and how many there are.
func (d Diagnostic) window() (line, pad string, width int) {
	src := []rune(d.Source)
	for i, r := range src { // a terminal must not act on a file's bytes
		if r != '\t' && (r < ' ' || r >= 0x7f && r < 0xa0 || r == utf8.RuneError) {
			src[i] = '\u00b7'
		}
	}
	col := min(max(d.Column-1, 0), len(src))
	end := min(max(d.EndColumn-1, col+1), max(len(src), col+1))
	start, lead := 0, ""
	if len(src) > maxShown && col > maxShown/2 {
		start, lead = col-maxShown/2, "…"
	}
	stop, trail := len(src), ""
	if stop-start > maxShown {
		stop, trail = start+maxShown, "…"
	}
	end = min(end, max(stop, col+1))
	var p strings.Builder
	p.WriteString(strings.Repeat(" ", utf8.RuneCountInString(lead)))
	for _, r := range src[start:col] {
		if r != '\t' {
			r = ' '
		}
		p.WriteRune(r)
	}
	return lead + string(src[start:stop]) + trail, p.String(), end - col
}

// Diagnostics are ordered by position. They encode to JSON as an array.
type Diagnostics []Diagnostic

// HasErrors reports whether any is an error rather than a warning.
func (d Diagnostics) HasErrors() bool {
	return slices.ContainsFunc(d, func(d Diagnostic) bool { return d.Severity == SeverityError })
}

// Err is nil without errors, else a *DiagnosticsError.
func (d Diagnostics) Err() error {
	if !d.HasErrors() {
		return nil
	}
	return &DiagnosticsError{Diagnostics: d}
}

// String renders them all, see Diagnostic.String.
func (d Diagnostics) String() string {
	var b strings.Builder
	for _, x := range d {
		b.WriteString(x.String())
	}
	return b.String()
}

// DiagnosticsError carries diagnostics, at least one of them an error. It wraps
// ErrInvalid.
type DiagnosticsError struct{ Diagnostics Diagnostics }

// Error is the first error with its place, and how many more there are.
func (e *DiagnosticsError) Error() string {
	n, first := 0, Diagnostic{}
	for _, d := range e.Diagnostics {
		if d.Severity == SeverityError {
			if n == 0 {
				first = d
			}
			n++
		}
	}
	s := fmt.Sprintf("%s:%d:%d: %s", first.Path, first.Line, first.Column, first.Message)
	if n > 1 {
		s += fmt.Sprintf(" (and %d more)", n-1)
	}
	return s
}

// Unwrap is ErrInvalid.
func (e *DiagnosticsError) Unwrap() error { return ErrInvalid }

func (d Diagnostics) sorted() Diagnostics {
	slices.SortStableFunc(d, func(a, b Diagnostic) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	return d
}

// What a hostile file can make us say is bounded; warnings have a bound of
// their own, so that they never hide an error.
const (
	maxErrors   = 200
	maxWarnings = 50
)

// reporter collects diagnostics about one source. The methods return the entry
// so that allowed values and advice can be added.
type reporter struct {
	src              *source
	diags            []*Diagnostic
	errors, warnings int
}

func (r *reporter) at(p Position, width int, format string, args ...any) *Diagnostic {
	d := r.diagnostic(p, width, format, args...)
	if r.errors++; r.errors <= maxErrors {
		r.diags = append(r.diags, d)
	}
	return d
}

func (r *reporter) warn(p Position, width int, format string, args ...any) {
	d := r.diagnostic(p, width, format, args...)
	d.Severity = SeverityWarning
	if r.warnings++; r.warnings <= maxWarnings {
		r.diags = append(r.diags, d)
	}
}

func (r *reporter) diagnostic(p Position, width int, format string, args ...any) *Diagnostic {
	p.Line = min(max(p.Line, 1), len(r.src.lines))
	line := r.src.lines[p.Line-1]
	p.Column = min(max(p.Column, 1), len(line)+1)
	return &Diagnostic{
		Path: r.src.path, Line: p.Line, Column: p.Column, EndColumn: p.Column + max(width, 1),
		Severity: SeverityError, Message: fmt.Sprintf(format, args...), Source: shorten(string(line), 4*maxShown, p.Column),
	}
}

func (r *reporter) result() Diagnostics {
	if len(r.diags) == 0 {
		return nil
	}
	out := make(Diagnostics, len(r.diags))
	for i, d := range r.diags {
		out[i] = *d
	}
	// What stands behind an alias is looked at once for each use.
	return slices.CompactFunc(out.sorted(), func(a, b Diagnostic) bool {
		return a.Line == b.Line && a.Column == b.Column && a.Message == b.Message
	})
}

// shorten keeps a source line whole as far as a reader can use it: the line up
// to a little after the column.
func shorten(line string, limit, column int) string {
	if keep := column + limit; utf8.RuneCountInString(line) > keep {
		return string([]rune(line)[:keep])
	}
	return line
}

func (d *Diagnostic) hint(format string, args ...any) *Diagnostic {
	d.Hint = fmt.Sprintf(format, args...)
	return d
}

// suggest adds what is allowed and, when one of it looks like got, a question.
func (d *Diagnostic) suggest(got string, allowed []string) *Diagnostic {
	if len(allowed) <= 40 {
		d.Allowed = allowed
	}
	if s := nearest(got, allowed); s != "" {
		d.Hint = fmt.Sprintf("did you mean %q?", s)
	}
	return d
}

// nearest is the candidate that got is probably a misspelling of, or "".
func nearest(got string, candidates []string) string {
	norm := func(s string) string {
		return strings.NewReplacer("_", "", "-", "", " ", "").Replace(strings.ToLower(s))
	}
	g := norm(got)
	if len(g) > 64 {
		return ""
	}
	best, bestDist := "", 2+2*max(1, len(g)/3)
	if len(g) < 2 {
		bestDist = 2 // every other letter is one edit away
	}
	for _, c := range candidates {
		n := norm(c)
		if len(n) > 64 {
			continue
		}
		dist := distance(g, n)
		if len(n) >= 3 && len(g) >= 3 && (strings.HasPrefix(g, n) || strings.HasPrefix(n, g)) {
			dist = min(dist, 1)
		}
		dist *= 2
		if n != "" && g != "" && n[0] != g[0] {
			dist++ // among equals, the one that begins alike
		}
		if dist < bestDist {
			best, bestDist = c, dist
		}
	}
	return best
}

// distance counts edits, a swap of neighbours as one (optimal string
// alignment).
func distance(a, b string) int {
	var before, last, row [66]int
	for j := range len(b) + 1 {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}
