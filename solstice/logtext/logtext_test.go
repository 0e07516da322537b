package logtext

import (
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestLine(t *testing.T) {
	for _, c := range []struct{ name, in, plain, coloured string }{
		{"text", "a\tb ü", "a\tb ü", "a\tb ü"},
		{"colour", "\x1b[1;31mred\x1b[0m", "red", "\x1b[1;31mred\x1b[0m\x1b[0m"},
		{"true colour", "\x1b[38:2::1:2:3mx", "x", "\x1b[38:2::1:2:3mx\x1b[0m"},
		{"cursor", "\x1b[2J\x1b[1;1Hx\x1b[1A", "x", "x"},
		{"private mode that ends in m", "\x1b[>4;1mx", "x", "x"},
		{"intermediate that ends in m", "\x1b[1 mx", "x", "x"},
		{"title", "a\x1b]0;pwned\x07b", "ab", "ab"},
		{"clipboard", "a\x1b]52;c;cm0gLXJm\x1b\\b", "ab", "ab"},
		{"string without end", "a\x1b]0;pwned", "a", "a"},
		{"device control", "a\x1bPq\x1b\\b", "ab", "ab"},
		{"sequence in a sequence", "\x1b[\x1b[31mx", "x", "\x1b[31mx\x1b[0m"},
		{"escape in parameters", "\x1b[1\x1b5mx", "mx", "mx"},
		{"two escapes", "\x1b\x1b[2Jx", "x", "x"},
		{"reset", "\x1bcx", "x", "x"},
		{"escape at the end", "x\x1b", "x", "x"},
		{"sequence cut off", "x\x1b[3", "x", "x"},
		{"bell, backspace, delete", "a\a\b\x7f\x00b", "ab", "ab"},
		{"progress", "10%\r50%\r100%\r", "100%", "100%"},
		{"C1 as UTF-8", "a\u009b2Jb", "a2Jb", "a2Jb"},
		{"C1 as a byte", "a\x9b2Jb", "a\ufffd2Jb", "a\ufffd2Jb"},
		{"C1 among parameters", "\x1b[3\u009b1mx", "1mx", "1mx"},
		{"direction", "a\u202eb\u2066c", "abc", "abc"},
		{"invalid UTF-8", "a\xffb", "a\ufffdb", "a\ufffdb"},
	} {
		if got := Line(c.in, false); got != c.plain {
			t.Errorf("%s: plain: %q, want %q", c.name, got, c.plain)
		}
		if got := Line(c.in, true); got != c.coloured {
			t.Errorf("%s: coloured: %q, want %q", c.name, got, c.coloured)
		}
	}
	if got := Plain("a\nb\x1b[31mc"); got != "a bc" {
		t.Errorf("plain: %q", got)
	}
}

var sgr = regexp.MustCompile(`\x1b\[[0-9;:]*m`)

func FuzzLine(f *testing.F) {
	for _, s := range []string{
		"", "plain", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07x", "\x1b]8;;http://x\x1b\\y", "\x1b[\x1b[2J", "\x1b\x1b]", "\x1b[3\u009b1m",
		"\x1bP1$r\x1b\\", "a\rb\rc", "\u202e\u2066", "\x9b31m", "\xc2\x1b[2J", "\x1b[?25l", "\x1b[>4;2m", "\x1b(0", "\x1b[31",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		plain, coloured := Line(in, false), Line(in, true)
		check(t, in, plain)
		check(t, in, sgr.ReplaceAllString(coloured, "")) // colours are all that is let through
		if strings.Contains(coloured, "\x1b") && !strings.HasSuffix(coloured, "\x1b[0m") {
			t.Errorf("Line(%q) = %q colours what comes next", in, coloured)
		}
		if again := Line(plain, false); again != plain {
			t.Errorf("Line(%q) = %q, and again %q", in, plain, again)
		}
	})
}

func check(t *testing.T, in, out string) {
	t.Helper()
	if !utf8.ValidString(out) {
		t.Errorf("Line(%q) = %q is not UTF-8", in, out)
	}
	for _, r := range out {
		if r < ' ' && r != '\t' || r == 0x7f || isControl(r) {
			t.Fatalf("Line(%q) = %q has %U", in, out, r)
		}
	}
}

func TestWriter(t *testing.T) {
	var out strings.Builder
	w := NewWriter(&out, false)
	for _, p := range []string{"one\ntw", "o\n", "\n", strings.Repeat("x", MaxLine), "\x1b[31mend"} {
		if _, err := w.Write([]byte(p)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if want := "one\ntwo\n\n" + strings.Repeat("x", MaxLine) + "\nend\n"; out.String() != want {
		t.Errorf("got %q", out.String())
	}
}
