// Package logtext makes text that jobs print, or that strangers chose, safe for people to
// look at: without what harms a terminal, and without what makes a line show as another.
package logtext

import (
	"bytes"
	"io"
	"strings"
)

// MaxLine is where a line without an end is broken for display, in bytes; stored logs
// are not changed.
const MaxLine = 4096

// Plain is for names and reasons: one line without colours.
func Plain(text string) string { return Line(strings.ReplaceAll(text, "\n", " "), false) }

// Line takes away what a line of a job's output could do: of escape sequences only
// colours are left, and they only where colour says so; of carriage returns what they
// would show. It is valid UTF-8 afterwards.
func Line(line string, colour bool) string {
	line = strings.TrimRight(line, "\r")
	if i := strings.LastIndexByte(line, '\r'); i >= 0 {
		line = line[i+1:]
	}
	var b strings.Builder
	coloured := false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == 0x1b:
			n, sgr := escape(line[i:])
			if sgr && colour {
				b.WriteString(line[i : i+n])
				coloured = true
			}
			i += n - 1
		case c == '\t' || c >= 0x20 && c != 0x7f:
			b.WriteByte(c)
		}
	}
	if coloured {
		b.WriteString("\x1b[0m")
	}
	return strings.Map(func(r rune) rune {
		if isControl(r) {
			return -1
		}
		return r
	}, strings.ToValidUTF8(b.String(), "\uFFFD"))
}

// isControl reports C1 control characters, which can also come as two bytes of
// UTF-8, and those that change the direction of text (UAX #9), with which a
// line could show as another.
func isControl(r rune) bool {
	return r >= 0x80 && r < 0xa0 || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069
}

// escape measures the escape sequence (ECMA-48) that s begins with and says
// whether it selects colours.
func escape(s string) (n int, sgr bool) {
	if len(s) < 2 {
		return 1, false
	}
	switch s[1] {
	case '[':
		sgr = true
		for i := 2; i < len(s); i++ {
			switch c := s[i]; {
			case c >= 0x40 && c <= 0x7e:
				return i + 1, sgr && c == 'm'
			case c < 0x20 || c >= 0x7f: // not part of a sequence: it ends here, unfinished
				return i, false
			case c != ';' && c != ':' && (c < '0' || c > '9'):
				sgr = false // private to some terminal
			}
		}
		return len(s), false
	case ']', 'P', '_', '^', 'X': // strings, ended by BEL or ESC \
		for i := 2; i < len(s); i++ {
			if s[i] == 0x07 {
				return i + 1, false
			}
			if s[i] == 0x1b && i+1 < len(s) && s[i+1] == '\\' {
				return i + 2, false
			}
		}
		return len(s), false
	case 0x1b: // an escape does not end another
		return 1, false
	}
	return 2, false
}

// Writer shows whole lines.
type Writer struct {
	w      io.Writer
	colour bool
	line   []byte
}

// NewWriter writes each line to w, as Line gives it.
func NewWriter(w io.Writer, colour bool) *Writer { return &Writer{w: w, colour: colour} }

// Write implements io.Writer.
func (w *Writer) Write(p []byte) (int, error) {
	for l := range bytes.Lines(p) {
		w.line = append(w.line, bytes.TrimSuffix(l, []byte("\n"))...)
		if l[len(l)-1] == '\n' || len(w.line) >= MaxLine {
			if err := w.flush(); err != nil {
				return 0, err
			}
		}
	}
	return len(p), nil
}

func (w *Writer) flush() error {
	_, err := io.WriteString(w.w, Line(string(w.line), w.colour)+"\n")
	w.line = w.line[:0]
	return err
}

// Close shows what has no line break behind it. It leaves what it writes to open.
func (w *Writer) Close() error {
	if len(w.line) == 0 {
		return nil
	}
	return w.flush()
}
