package main

import (
	"encoding/json"
	"fmt"
	"os"
	"time"

	"golang.org/x/term"

	"github.com/solstice-ci/solstice-go/solstice/daemon/show"
)

// output are the flags of commands that show something.
type output struct{ show.Output }

func (o output) screen(names ...string) *screen { return newScreen(os.Stdout, o.Colour(), names) }

func isTerminal() bool { return term.IsTerminal(int(os.Stdout.Fd())) }

// document prints one JSON document.
func document(v any) error { return printed(show.Document(v)) }

// line prints one of several JSON documents.
func line(v any) error { return printed(json.NewEncoder(os.Stdout).Encode(v)) }

func printed(err error) error {
	if err != nil {
		return unable("cannot print", err, "")
	}
	return nil
}

// table aligns columns; cells may be coloured.
type table struct{ show.Table }

func (t *table) row(cells ...string) { t.Row(cells...) }

func (t *table) print(s *screen, indent string) {
	for line := range t.Lines() {
		s.printf("%s%s", indent, line)
	}
}

// header is a table's first row.
func (s *screen) header(t *table, names ...string) {
	for i, n := range names {
		names[i] = s.faint(n)
	}
	t.row(names...)
}

// state is a state in words and colour.
func (s *screen) state(state string) string {
	if m, ok := marks[state]; ok {
		return s.paint(words(state), m.colour)
	}
	return words(state)
}

// age is how long ago something was, roughly.
func age(t, now time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return span(now.Sub(t))
}

func span(d time.Duration) string {
	d = max(d, 0)
	for _, u := range []struct {
		unit time.Duration
		name string
		till time.Duration
	}{{time.Second, "s", 2 * time.Minute}, {time.Minute, "m", 2 * time.Hour}, {time.Hour, "h", 48 * time.Hour}} {
		if d < u.till {
			return fmt.Sprintf("%d%s", d/u.unit, u.name)
		}
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

// shortest is how much of an ID is shown at least: of the time of its making
// all but a fraction of a millisecond.
const shortest = 13

// short gives as much of each ID as tells it from all others.
func short(ids ...string) map[string]string {
	out := map[string]string{}
	for _, id := range ids {
		n := shortest
		for _, other := range ids {
			if other != id {
				n = max(n, common(id, other)+1)
			}
		}
		out[id] = id[:min(n, len(id))]
	}
	return out
}

func common(a, b string) int {
	n := 0
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return n
}

// note tells a person something beside what was asked for.
func note(format string, args ...any) {
	_, _ = fmt.Fprintf(os.Stderr, format+"\n", args...) // nobody is left to tell when it fails
}
