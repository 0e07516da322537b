package gitcmd

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
)

func TestObjects(t *testing.T) {
	g, err := Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := g.Run(t.Context(), Options{}, "init", "-q", "--bare", dir); err != nil {
		t.Fatal(err)
	}
	in := Options{GitDir: dir}
	write := func(content string) string {
		t.Helper()
		o := in
		o.Stdin = strings.NewReader(content)
		out, err := g.Output(t.Context(), o, "hash-object", "-w", "--stdin")
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(out))
	}
	r := g.Objects(in)
	t.Cleanup(r.Close)
	want := func(object, content string) {
		t.Helper()
		kind, data, err := r.Read(t.Context(), object, 1<<20)
		if err != nil || kind != "blob" || string(data) != content {
			t.Errorf("%s: %s %q, %v; want %q", object, kind, data, err, content)
		}
	}
	empty, lines, large := write(""), write("a\nb missing\n\n"), write(strings.Repeat("x", 1000))
	want(empty, "")
	want(lines, "a\nb missing\n\n")
	want(write("newer than the process"), "newer than the process")

	if _, _, err := r.Read(t.Context(), large, 999); !errors.Is(err, ErrTooLarge) {
		t.Errorf("over the limit: %v", err)
	}
	want(large, strings.Repeat("x", 1000))
	if _, _, err := r.Read(t.Context(), strings.Repeat("0", 39)+"1", 1); !errors.Is(err, ErrNoObject) {
		t.Errorf("absent: %v", err)
	}
	if _, _, err := r.Read(t.Context(), "HEAD\n"+empty, 1); err == nil || errors.Is(err, ErrNoObject) {
		t.Errorf("no object name: %v", err)
	}
	want(lines, "a\nb missing\n\n")

	over, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := r.Read(over, lines, 1<<20); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	want(lines, "a\nb missing\n\n")

	// A process that died in between is replaced.
	if err := r.run.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	want(lines, "a\nb missing\n\n")
	r.Close()
	want(empty, "")

	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				want(lines, "a\nb missing\n\n")
				want(large, strings.Repeat("x", 1000))
			}
		})
	}
	wg.Wait()

	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	r.Close()
	if _, _, err := r.Read(t.Context(), empty, 1); err == nil {
		t.Error("read from a repository that is gone")
	}
}
