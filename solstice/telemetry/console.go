package telemetry

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/term"
)

// formatter makes a handler that writes each record in one call of w.Write.
type formatter func(w io.Writer) slog.Handler

func newFormatter(c LogConfig) (formatter, error) {
	tty := isTerminal(c.Writer)
	format := c.Format
	if format == "" || format == FormatAuto {
		format = FormatJSON
		if tty {
			format = FormatText
		}
	}
	switch format {
	case FormatText:
		return func(w io.Writer) slog.Handler { return newTextHandler(w, tty) }, nil
	case FormatJSON:
		return func(w io.Writer) slog.Handler {
			return slog.NewJSONHandler(w, &slog.HandlerOptions{Level: slog.Level(-128)})
		}, nil
	}
	return nil, wrapf("log format %q: use auto, text or json", c.Format)
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// textHandler writes `TIME LEVEL message key=value …`: on a terminal in colour
// and without the date. Attributes are formatted, and quoted where needed, by
// slog's text handler.
type textHandler struct {
	attrs slog.Handler // writes into shared.buf
	*textShared
}

type textShared struct {
	colour bool
	mu     sync.Mutex
	buf    bytes.Buffer
	w      io.Writer
}

func newTextHandler(w io.Writer, colour bool) *textHandler {
	sh := &textShared{colour: colour, w: w}
	return &textHandler{attrs: slog.NewTextHandler(&sh.buf, &slog.HandlerOptions{
		Level: slog.Level(-128),
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			// The record's own fields are blank, see Handle.
			_, isLevel := a.Value.Any().(slog.Level)
			if len(groups) == 0 && (a.Key == slog.MessageKey && a.Value.String() == "" || a.Key == slog.LevelKey && isLevel) {
				return slog.Attr{}
			}
			return a
		},
	}), textShared: sh}
}

func (h *textHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *textHandler) WithAttrs(a []slog.Attr) slog.Handler {
	return &textHandler{h.attrs.WithAttrs(a), h.textShared}
}

func (h *textHandler) WithGroup(name string) slog.Handler {
	return &textHandler{h.attrs.WithGroup(name), h.textShared}
}

func (h *textHandler) Handle(ctx context.Context, r slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.buf.Reset()
	if !r.Time.IsZero() {
		layout := "2006-01-02T15:04:05.000Z07:00 "
		if h.colour {
			layout = "15:04:05.000 "
		}
		h.buf.Write(r.Time.AppendFormat(h.buf.AvailableBuffer(), layout))
	}
	name := levelName(r.Level)
	if h.colour {
		h.buf.WriteString(levelColour(r.Level) + name + "\x1b[0m")
	} else {
		h.buf.WriteString(name)
	}
	h.buf.WriteString(strings.Repeat(" ", max(1, 6-len(name))))
	h.buf.WriteString(printable(r.Message))
	h.buf.WriteByte(' ')
	bare := slog.NewRecord(time.Time{}, r.Level, "", r.PC)
	r.Attrs(func(a slog.Attr) bool { bare.AddAttrs(a); return true })
	if err := h.attrs.Handle(ctx, bare); err != nil {
		return err
	}
	line := append(bytes.TrimRight(h.buf.Bytes(), " \n"), '\n')
	_, err := h.w.Write(line)
	return err
}

func levelName(l slog.Level) string {
	if l < slog.LevelDebug {
		return "TRACE"
	}
	return l.String()
}

func levelColour(l slog.Level) string {
	switch {
	case l >= slog.LevelError:
		return "\x1b[31m"
	case l >= slog.LevelWarn:
		return "\x1b[33m"
	case l >= slog.LevelInfo:
		return "\x1b[32m"
	}
	return "\x1b[90m"
}

// printable quotes a message that would move a terminal's cursor or forge a
// line.
func printable(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}

// asyncWriter takes what is written to it into a bounded buffer and has one
// goroutine write it on. A write that does not fit is dropped and counted; the
// count is logged when there is room again.
type asyncWriter struct {
	w     io.Writer
	limit int
	note  slog.Handler  // writes to w, for the count of dropped records
	wake  chan struct{} // one token: there is something to do
	done  chan struct{} // closed when the goroutine has ended

	mu      sync.Mutex
	buf     []byte
	dropped int
	closing bool
	direct  bool // the goroutine has ended: callers write themselves
}

func newAsyncWriter(w io.Writer, limit int, f formatter) *asyncWriter {
	a := &asyncWriter{w: w, limit: limit, note: f(w), wake: make(chan struct{}, 1), done: make(chan struct{})}
	go a.loop()
	return a
}

// Write neither blocks nor fails, except after close, when it is a plain write.
func (a *asyncWriter) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.direct:
		return a.w.Write(p)
	case len(a.buf)+len(p) > a.limit:
		a.dropped++
	default:
		a.buf = append(a.buf, p...)
	}
	a.signal()
	return len(p), nil
}

func (a *asyncWriter) signal() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

func (a *asyncWriter) loop() {
	defer close(a.done)
	var spare []byte
	for {
		a.mu.Lock()
		out, dropped := a.buf, a.dropped
		if len(out) == 0 && dropped == 0 {
			a.direct = a.closing
			end := a.closing
			a.mu.Unlock()
			if end {
				return
			}
			<-a.wake
			continue
		}
		a.buf, a.dropped = spare[:0], 0
		a.mu.Unlock()
		// A console that cannot be written to leaves no one to tell.
		if len(out) > 0 {
			_, _ = a.w.Write(out)
		}
		if dropped > 0 {
			r := slog.NewRecord(time.Now(), slog.LevelWarn, "log records dropped: the console could not keep up", 0)
			r.AddAttrs(slog.Int("dropped", dropped))
			_ = a.note.Handle(context.Background(), r)
		}
		spare = out
	}
}

// close writes what is buffered, as far as ctx allows.
func (a *asyncWriter) close(ctx context.Context) error {
	a.mu.Lock()
	a.closing = true
	a.mu.Unlock()
	a.signal()
	select {
	case <-a.done:
		return nil
	case <-ctx.Done():
		return wrapf("console did not take the last log records: %w", ctx.Err())
	}
}
