package gitcmd

import (
	"errors"
	"strings"
	"testing"
)

func TestCheckRef(t *testing.T) {
	for _, good := range []string{"main", "refs/heads/main", "v1.0", "feature/a-b_c", "ä", "a@b", "a{b", "HEAD"} {
		if err := CheckRef(good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{
		"", "-x", "--upload-pack=x", "@", "a..b", ".a", "a/.b", "a.lock", "a.lock/b", "a.", "/a", "a/", "a//b",
		"a b", "a~1", "a^", "a:b", "a?", "a*", "a[b", `a\b`, "a@{1}", "a\x00", "a\n", "a\x7f", strings.Repeat("a", 2000),
	} {
		if err := CheckRef(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// What CheckRef accepts, git accepts too.
func FuzzCheckRef(f *testing.F) {
	g, err := Find(f.Context())
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{"main", "refs/heads/a", "a..b", "a.lock", "@", "-a", "a/@/b", "\x80", "a@{"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if CheckRef(name) != nil {
			return
		}
		if err := g.Run(t.Context(), Options{}, "check-ref-format", "--allow-onelevel", name); err != nil {
			t.Errorf("git refuses %q: %v", name, err)
		}
	})
}

func TestCheckObject(t *testing.T) {
	for _, good := range []string{strings.Repeat("a", 40), strings.Repeat("0", 64)} {
		if err := CheckObject(good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", "abc", strings.Repeat("A", 40), strings.Repeat("g", 40), strings.Repeat("a", 41), "-" + strings.Repeat("a", 39)} {
		if err := CheckObject(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestCheckRevision(t *testing.T) {
	for _, good := range []string{"main", "main~3", "HEAD^2", "v1^{commit}", "abc123", "main@{1}", "@"} {
		if err := CheckRevision(good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", "--all", "^main", "a..b", "a...b", "main:file", ":/text", "main^{/text}", "a b", "a\nb", "a*", strings.Repeat("a", 2000)} {
		if err := CheckRevision(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestCheckPath(t *testing.T) {
	for _, good := range []string{"a", "a/b", ".solstice/workflow.yaml", "a b", "-a", "a\nb", "..a", "ä"} {
		if err := CheckPath(good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", ".", "..", "../a", "a/..", "a/../b", "/a", "a/", "a//b", "./a", "a/./b", ".git/config", "a/.GIT/x", "a\x00b"} {
		if err := CheckPath(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestCheckURL(t *testing.T) {
	for _, good := range []string{"https://example.org/a/b.git", "https://user@example.org/a", "ssh://git@example.org:22/a", "file:///srv/a", "/srv/a"} {
		if err := CheckURL(good, "https", "ssh", "file"); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{
		"", "-x", "--upload-pack=x", "https://", "https:///a", "https:a", "http://example.org/a", "ext::sh -c x", "git@example.org:a",
		"ssh://-oProxyCommand=x/a", "ssh://-oProxyCommand@host/a", "file://other/a", "/srv/a", "a/b", "https://example.org/a\nb",
		"https://user:s3cret@example.org/a", "https://example.org/a#x", "https://exa mple.org/%zz", "fd::3", "https://" + strings.Repeat("a", 5000),
	} {
		err := CheckURL(bad, "https", "ssh")
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		} else if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("the error repeats a password: %v", err)
		}
	}
}
