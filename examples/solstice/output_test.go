package main

import (
	"regexp"
	"strings"
	"testing"
)

var sgr = regexp.MustCompile(`\x1b\[[0-9;:]*m`)

func TestLinesStayWhole(t *testing.T) {
	var out strings.Builder
	s := newScreen(&out, false, []string{"a", "long name"})
	w := s.job("a")
	for _, p := range []string{"one\ntw", "o\n", "\n", strings.Repeat("x", maxLine+1), "\nend"} {
		if _, err := w.Write([]byte(p)); err != nil {
			t.Fatal(err)
		}
	}
	w.end()
	want := "a         | one\na         | two\na         |\na         | " + strings.Repeat("x", maxLine) + "\na         | x\na         | end\n"
	if out.String() != want {
		t.Errorf("got %q", out.String())
	}
}
