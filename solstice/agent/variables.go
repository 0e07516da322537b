package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

// MaxVariables is how large a SOLSTICE_OUTPUT, SOLSTICE_ENV or SOLSTICE_PATH
// file may be, in bytes.
const MaxVariables = 1 << 20

// ErrVariables: a step wrote something into one of its files that is not in
// the format, or too much.
var ErrVariables = errors.New("agent: malformed variables")

// ParseVariables reads what a step wrote to SOLSTICE_OUTPUT or SOLSTICE_ENV:
// lines NAME=VALUE, or for values of several lines
//
//	NAME<<DELIMITER
//	any lines
//	DELIMITER
//
// A name begins with a letter or underscore and goes on with those, digits and
// '-'. Values are UTF-8 without NUL, kept as they are; empty lines are ignored.
// Order is kept, a later value for a name is a later entry. Errors wrap
// ErrVariables and name the line.
func ParseVariables(data []byte) ([]workflow.KV, error) {
	if len(data) > MaxVariables {
		return nil, fmt.Errorf("%w: larger than %s", ErrVariables, formatSize(MaxVariables))
	}
	var out []workflow.KV
	n := 0
	next := func() (line string, ok bool) {
		if len(data) == 0 {
			return "", false
		}
		var l []byte
		l, data, _ = bytes.Cut(data, []byte("\n"))
		n++
		return string(l), true
	}
	bad := func(line int, format string, args ...any) ([]workflow.KV, error) {
		return nil, fmt.Errorf("%w: line %d: %s", ErrVariables, line, fmt.Sprintf(format, args...))
	}
	for {
		line, ok := next()
		if !ok {
			return out, nil
		}
		if strings.TrimRight(line, "\r") == "" {
			continue
		}
		begin := n
		name, value, single := strings.Cut(line, "=")
		hname, delim, doc := strings.Cut(line, "<<")
		doc = doc && (!single || len(hname) < len(name))
		if !doc && !single {
			return bad(begin, "want NAME=VALUE or NAME<<DELIMITER, got %q", clip(line))
		}
		if doc {
			name = hname
			delim = strings.TrimRight(delim, "\r")
			if strings.TrimSpace(delim) == "" {
				return bad(begin, "no delimiter after <<")
			}
			var lines []string
			for {
				line, ok := next()
				if !ok {
					return bad(begin, "the value of %q is not closed by a line %q", clip(name), clip(delim))
				}
				if strings.TrimRight(line, "\r") == delim {
					break
				}
				lines = append(lines, line)
			}
			value = strings.Join(lines, "\n")
		}
		if !validName(name) {
			return bad(begin, "%q is not a name: want letters, digits, '_' and '-'", clip(name))
		}
		if !utf8.ValidString(value) || strings.IndexByte(value, 0) >= 0 {
			return bad(begin, "the value of %q is not text", name)
		}
		out = append(out, workflow.KV{Name: name, Value: value})
	}
}

func validName(s string) bool {
	for i := range len(s) {
		c := s[i]
		letter := c == '_' || c|0x20 >= 'a' && c|0x20 <= 'z'
		if !letter && (i == 0 || c != '-' && (c < '0' || c > '9')) {
			return false
		}
	}
	return s != ""
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

// checkEnv refuses what a step may not set for those after it.
func checkEnv(vars []workflow.KV) error {
	for _, kv := range vars {
		switch {
		case strings.HasPrefix(kv.Name, "SOLSTICE"):
			return fmt.Errorf("%w: %s is reserved", ErrVariables, kv.Name)
		case strings.Contains(kv.Name, "-"):
			return fmt.Errorf("%w: %q cannot be an environment variable", ErrVariables, kv.Name)
		}
	}
	return nil
}

// parsePath reads what a step wrote to SOLSTICE_PATH: one directory per line,
// the last one comes first in PATH.
func parsePath(data []byte) ([]string, error) {
	var dirs []string
	for i, line := range strings.Split(string(data), "\n") {
		line = strings.TrimRight(line, "\r")
		if line == "" {
			continue
		}
		if !strings.HasPrefix(line, "/") || strings.ContainsAny(line, ":\x00") {
			return nil, fmt.Errorf("%w: line %d: %q is not an absolute directory", ErrVariables, i+1, clip(line))
		}
		dirs = append([]string{line}, dirs...)
	}
	return dirs, nil
}

// readStepFile reads one of a step's files. The step may have replaced it by
// anything, so only a regular file of bounded size is read.
func readStepFile(name string) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrVariables, err)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: not a regular file", ErrVariables)
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxVariables+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrVariables, err)
	}
	if len(data) > MaxVariables {
		return nil, fmt.Errorf("%w: larger than %s", ErrVariables, formatSize(MaxVariables))
	}
	return data, nil
}
