package sqldb

import (
	"context"
	"database/sql/driver"
	"encoding/hex"
	"strconv"
	"strings"
)

// bun writes values into a statement's text, so that SQLite would parse every
// statement anew, which costs more than most of them do. lift takes them out
// again, and prepared keeps what a connection has parsed.

// maxPrepared bounds the statements that a connection keeps; the program has
// about half as many.
const maxPrepared = 256

type prepared struct {
	driver.Stmt
	busy bool // its rows are being read
}

// prepare gives the statement and its arguments, or nil where the query is to
// be run as it is. done gives it back.
func (c *conn) prepare(ctx context.Context, query string, args []driver.NamedValue) (_ *prepared, _ []driver.NamedValue, done func()) {
	if len(args) == 0 {
		var ok bool
		if query, args, ok = lift(query); !ok {
			return nil, nil, nil
		}
	}
	p := c.prepared[query]
	if p == nil {
		s, err := c.sqliteConn.PrepareContext(ctx, query)
		if err != nil {
			return nil, nil, nil // running it says why
		}
		if len(c.prepared) >= maxPrepared {
			c.forget()
		}
		if c.prepared == nil {
			c.prepared = map[string]*prepared{}
		}
		p = &prepared{Stmt: s}
		c.prepared[query] = p
	}
	if p.busy {
		return nil, nil, nil
	}
	p.busy = true
	return p, args, func() { p.busy = false }
}

// forget closes the statements that are not in use.
func (c *conn) forget() {
	for query, p := range c.prepared {
		if !p.busy {
			_ = p.Close() // says what its last execution said
			delete(c.prepared, query)
		}
	}
}

// lift replaces the values in a statement by parameters. It leaves alone what
// SQLite compares with the condition of a partial index, or takes for a
// position: words of lower case, and numbers of one digit. ok is false for
// what is not worth keeping, or not certain to mean the same.
func lift(query string) (text string, args []driver.NamedValue, ok bool) {
	switch word, _, _ := strings.Cut(strings.TrimLeft(query, " \t\r\n"), " "); strings.ToUpper(strings.TrimSpace(word)) {
	case "SELECT", "WITH", "INSERT", "UPDATE", "DELETE":
	default:
		return "", nil, false
	}
	var b strings.Builder
	add := func(v driver.Value) {
		args = append(args, driver.NamedValue{Ordinal: len(args) + 1, Value: v})
		b.WriteByte('?')
	}
	for i := 0; i < len(query); {
		switch c := query[i]; {
		case c == '\'':
			end := closing(query, i)
			if end < 0 {
				return "", nil, false
			}
			value := strings.ReplaceAll(query[i+1:end], "''", "'")
			if strings.Trim(value, "abcdefghijklmnopqrstuvwxyz_") == "" {
				b.WriteString(query[i : end+1])
			} else {
				add(value)
			}
			i = end + 1
		case c == '"':
			end := closing(query, i)
			if end < 0 {
				return "", nil, false
			}
			b.WriteString(query[i : end+1])
			i = end + 1
		case (c == 'X' || c == 'x') && i+1 < len(query) && query[i+1] == '\'':
			end := closing(query, i+1)
			if end < 0 {
				return "", nil, false
			}
			value, err := hex.DecodeString(query[i+2 : end])
			if err != nil {
				return "", nil, false
			}
			add(value)
			i = end + 1
		case '0' <= c && c <= '9':
			end := i
			for end < len(query) && isWord(query[end]) {
				end++
			}
			v, err := strconv.ParseInt(query[i:end], 10, 64)
			if err != nil || end-i == 1 || end < len(query) && query[end] == '.' {
				b.WriteString(query[i:end])
			} else {
				add(v)
			}
			i = end
		case isWord(c):
			end := i
			for end < len(query) && isWord(query[end]) {
				end++
			}
			b.WriteString(query[i:end])
			i = end
		case c == '?', c == ';', c == '-' && strings.HasPrefix(query[i:], "--"), c == '/' && strings.HasPrefix(query[i:], "/*"), c == '[', c == '`':
			return "", nil, false
		default:
			b.WriteByte(c)
			i++
		}
	}
	return b.String(), args, true
}

func isWord(c byte) bool {
	return c == '_' || c == '.' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c >= 0x80
}

// closing finds the quote that ends what begins at i; doubled ones do not.
func closing(query string, i int) int {
	quote := query[i]
	for j := i + 1; j < len(query); j++ {
		if query[j] != quote {
			continue
		}
		if j+1 < len(query) && query[j+1] == quote {
			j++
			continue
		}
		return j
	}
	return -1
}
