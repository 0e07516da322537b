// Package show is what commands show things with: tables whose columns line up, JSON,
// and text of others that can do nothing to a terminal.
package show

import (
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"os"
	"strings"

	"github.com/charmbracelet/lipgloss"
	"golang.org/x/term"
)

// Output are the flags of commands that show something on standard output.
type Output struct {
	JSON    bool   `name:"json" group:"Output" help:"Print JSON; see docs/cli.md."`
	Plain   bool   `group:"Output" help:"No colours, also on a terminal."`
	NoColor string `hidden:"" env:"NO_COLOR"` // https://no-color.org: anything but empty
}

// Colour reports whether there are to be colours.
func (o Output) Colour() bool {
	return !o.Plain && o.NoColor == "" && term.IsTerminal(int(os.Stdout.Fd()))
}

// Faint is a label.
func (o Output) Faint(text string) string {
	if !o.Colour() || text == "" {
		return text
	}
	return "\x1b[2m" + text + "\x1b[0m"
}

// Header is a row of labels.
func (o Output) Header(t *Table, names ...string) {
	for i, n := range names {
		names[i] = o.Faint(n)
	}
	t.Row(names...)
}

// Document prints one JSON document.
func Document(v any) error {
	enc := json.NewEncoder(os.Stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// Table aligns columns; cells may be coloured. Its zero value is empty.
type Table struct{ rows [][]string }

// Row adds one.
func (t *Table) Row(cells ...string) { t.rows = append(t.rows, cells) }

// Lines gives the rows, without spaces and line breaks at their ends.
func (t *Table) Lines() iter.Seq[string] {
	var widths []int
	for _, r := range t.rows {
		for i, c := range r {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], lipgloss.Width(c))
		}
	}
	return func(yield func(string) bool) {
		for _, r := range t.rows {
			var b strings.Builder
			for i, c := range r {
				b.WriteString(c)
				if i < len(r)-1 {
					b.WriteString(strings.Repeat(" ", widths[i]-lipgloss.Width(c)+2))
				}
			}
			if !yield(strings.TrimRight(b.String(), " ")) {
				return
			}
		}
	}
}

// Print writes the lines.
func (t *Table) Print(w io.Writer) error {
	for line := range t.Lines() {
		if _, err := fmt.Fprintln(w, line); err != nil {
			return err
		}
	}
	return nil
}
