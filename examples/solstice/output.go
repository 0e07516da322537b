package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/charmbracelet/lipgloss"
	"github.com/muesli/termenv"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/logtext"
)

const (
	maxLine  = logtext.MaxLine
	maxWidth = 32 // of the column of job names; longer names stick out
	lastKept = 20 // lines of a step that the summary can show
)

// screen prints the lines of several jobs, each line whole.
type screen struct {
	mu     sync.Mutex
	w      io.Writer
	colour *lipgloss.Renderer // nil: none
	width  int                // of the column of job names
	next   int                // in palette
}

var palette = []lipgloss.Color{"6", "5", "4", "3", "2", "14", "13", "12"}

// newScreen knows the names of all jobs beforehand, so that the columns never
// move.
func newScreen(w io.Writer, colour bool, names []string) *screen {
	s := &screen{w: w}
	if colour {
		s.colour = lipgloss.NewRenderer(w)
		s.colour.SetColorProfile(termenv.ANSI)
	}
	for _, n := range names {
		s.width = max(s.width, min(lipgloss.Width(n), maxWidth))
	}
	return s
}

func (s *screen) style(text string, with func(lipgloss.Style) lipgloss.Style) string {
	if s.colour == nil || text == "" {
		return text
	}
	return with(s.colour.NewStyle().Inline(true)).Render(text)
}

func (s *screen) paint(text string, c lipgloss.Color) string {
	return s.style(text, func(st lipgloss.Style) lipgloss.Style { return st.Foreground(c) })
}

func (s *screen) bold(text string) string {
	return s.style(text, func(st lipgloss.Style) lipgloss.Style { return st.Bold(true) })
}

func (s *screen) faint(text string) string {
	return s.style(text, func(st lipgloss.Style) lipgloss.Style { return st.Faint(true) })
}

func (s *screen) column(name string) string {
	return name + strings.Repeat(" ", max(0, s.width-lipgloss.Width(name)))
}

func (s *screen) printf(format string, args ...any) {
	line := strings.TrimRight(fmt.Sprintf(format, args...), " ")
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _ = fmt.Fprintln(s.w, line) // nobody is left to tell when it fails
}

// clear makes a terminal's screen empty.
func (s *screen) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _ = io.WriteString(s.w, "\x1b[H\x1b[2J\x1b[3J")
}

// job makes the writer of one job's lines.
func (s *screen) job(name string) *jobWriter {
	colour := palette[s.next%len(palette)]
	s.next++
	return &jobWriter{s: s, prefix: s.paint(s.column(name)+" |", colour)}
}

// jobWriter breaks a job's bytes into prefixed lines and keeps the last ones.
type jobWriter struct {
	s      *screen
	prefix string
	line   []byte
	last   []string
}

func (w *jobWriter) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		i := bytes.IndexByte(p, '\n')
		if i >= 0 && len(w.line)+i <= maxLine {
			w.line = append(w.line, p[:i]...)
			p = p[i+1:]
			w.flush()
			continue
		}
		take := min(len(p), maxLine-len(w.line))
		w.line = append(w.line, p[:take]...)
		p = p[take:]
		if len(w.line) >= maxLine {
			w.flush()
		}
	}
	return n, nil
}

func (w *jobWriter) flush() {
	text := logtext.Line(string(w.line), w.s.colour != nil)
	w.line = w.line[:0]
	w.last = append(w.last, text)
	if len(w.last) > lastKept {
		w.last = w.last[1:]
	}
	w.put(text)
}

// end prints what has no line break behind it.
func (w *jobWriter) end() {
	if len(w.line) > 0 {
		w.flush()
	}
}

func (w *jobWriter) put(text string) { w.s.printf("%s %s", w.prefix, text) }

// note prints a line of ours among the job's.
func (w *jobWriter) note(format string, args ...any) {
	w.put(w.s.faint("· " + fmt.Sprintf(format, args...)))
}

var marks = map[string]struct {
	sign   string
	colour lipgloss.Color
}{
	"succeeded": {"✓", "2"}, "failed": {"✗", "1"}, "timed_out": {"✗", "1"}, "errored": {"!", "1"},
	"cancelled": {"-", "3"}, "skipped": {"-", "8"},
}

func (s *screen) mark(state string) string {
	m, ok := marks[state]
	if !ok {
		return "·" // it is not over
	}
	return s.bold(s.paint(m.sign, m.colour))
}

// duration is empty where something never began or ended.
func duration(from, to time.Time) string {
	if from.IsZero() || to.IsZero() {
		return ""
	}
	switch d := to.Sub(from); {
	case d < time.Second:
		return fmt.Sprintf("%.2fs", d.Seconds())
	case d < 10*time.Second:
		return fmt.Sprintf("%.1fs", d.Seconds())
	default:
		return d.Round(time.Second).String()
	}
}

// failure is what a person wants to see of a job that failed.
type failure struct {
	what  string
	lines []string
}

// summary says what became of a run, and of each job that failed the step and
// its last lines.
func (s *screen) summary(r solstice.Run, name naming, failures map[string]failure) {
	s.printf("")
	s.printf("%s %s %s %s", s.mark(string(r.State)), s.bold(plain(r.Workflow)), words(string(r.State)),
		s.faint(prefixed("in ", duration(r.CreatedAt, r.FinishedAt))))
	for _, j := range r.Jobs {
		s.printf("  %s %s  %-9s  %s  %s", s.mark(string(j.State)), s.column(name(r, j)), words(string(j.State)),
			s.faint(fmt.Sprintf("%6s", duration(j.StartedAt, j.FinishedAt))), s.faint(plain(j.Reason)))
	}
	for _, j := range r.Jobs {
		f, ok := failures[j.ID]
		if !ok || j.State == solstice.JobSucceeded || j.State == solstice.JobSkipped || j.State == solstice.JobCancelled {
			continue
		}
		if f.what == "" {
			f.what = words(string(j.State)) + prefixed(": ", plain(j.Reason))
		}
		s.printf("")
		s.printf("%s %s", s.bold(name(r, j)+":"), s.paint(f.what, marks["failed"].colour))
		for _, l := range f.lines {
			s.printf("    %s", l)
		}
	}
}

func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}

func words(s string) string { return strings.ReplaceAll(s, "_", " ") }

// plain is for names and reasons.
func plain(text string) string { return logtext.Plain(text) }
