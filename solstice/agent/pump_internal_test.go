package agent

import (
	"bytes"
	"os"
	"testing"
)

// TestPumpHeldOpen: an output that outlives its process is read to what was in
// it, and then given up.
func inGoroutine(f func()) { go f() }

func TestPumpHeldOpen(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	defer r.Close()
	var got bytes.Buffer
	p := startPump(r, func(b []byte) { got.Write(b) }, inGoroutine)
	text := bytes.Repeat([]byte("0123456789"), 6000) // fits into the pipe
	if _, err := w.Write(text); err != nil {
		t.Fatal(err)
	}
	p.finish()
	if !p.open || !bytes.Equal(got.Bytes(), text) {
		t.Errorf("open: %v, read %d of %d bytes", p.open, got.Len(), len(text))
	}
	done := make(chan struct{})
	go func() {
		discard(r)
		close(done)
	}()
	// A leftover writer neither blocks nor breaks.
	for range 50 {
		if _, err := w.Write(text); err != nil {
			t.Fatal(err)
		}
	}
	r.Close()
	<-done
}

// TestPumpEnd: a closed output ends the pump by itself; pieces have a bound.
func TestPumpEnd(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var total, calls int
	p := startPump(r, func(b []byte) {
		if len(b) == 0 || len(b) > pumpBuffer {
			t.Errorf("a piece of %d bytes", len(b))
		}
		total += len(b)
		calls++
	}, inGoroutine)
	const lines = 20_000
	for range lines {
		if _, err := w.WriteString("a line\n"); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	p.finish()
	if p.open || total != lines*7 {
		t.Errorf("open: %v, read %d of %d bytes", p.open, total, lines*7)
	}
	if calls > lines/10 {
		t.Errorf("%d lines came in %d pieces: a busy output is not gathered", lines, calls)
	}
}
