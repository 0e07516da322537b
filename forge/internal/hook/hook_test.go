package hook

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestWebURL(t *testing.T) {
	for in, keep := range map[string]bool{
		"https://git.example.org/a": true, "http://localhost:3000/a/b": true,
		"": false, "javascript:alert(1)": false, "//git.example.org": false, "https://": false, "ftp://git.example.org/": false,
		"https://user:password@git.example.org/": false, "https://git.example.org/" + strings.Repeat("a", 2000): false,
	} {
		if got := WebURL(in); (got == in && in != "") != keep || !keep && got != "" {
			t.Errorf("WebURL(%.40q) = %q", in, got)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("first\nsecond", 3)
	f.Add("\xff\xfe ü", 2)
	f.Fuzz(func(t *testing.T, s string, n int) {
		n = max(n, 0)
		if got := Text(s, n); len(got) > n || !utf8.ValidString(got) {
			t.Errorf("Text(%q, %d) = %q", s, n, got)
		}
		if got := Line(s); strings.ContainsRune(got, '\n') || len(got) > 1000 || !utf8.ValidString(got) {
			t.Errorf("Line(%q) = %q", s, got)
		}
		if r, err := Repo(s); err == nil && (r.FullName() != s || r.Validate() != nil) {
			t.Errorf("Repo(%q) = %+v", s, r)
		}
	})
}
