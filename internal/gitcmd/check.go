package gitcmd

import (
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"
)

const (
	maxRef = 1024
	maxURL = 4096
)

// CheckRef tells whether name may be a branch, a tag or a full ref name, by
// the rules of git-check-ref-format(1) with one level allowed, and no leading
// dash. It wraps ErrInvalid.
func CheckRef(name string) error {
	if why := badRef(name); why != "" {
		return fmt.Errorf("%w: ref %q %s", ErrInvalid, clip(name), why)
	}
	return nil
}

func badRef(name string) string {
	switch {
	case name == "":
		return "is empty"
	case len(name) > maxRef:
		return "is too long"
	case name == "@":
		return "is not a name"
	case name[0] == '-':
		return "begins with a dash"
	case strings.HasSuffix(name, "."):
		return "ends with a dot"
	case strings.Contains(name, ".."):
		return "has two dots"
	case strings.Contains(name, "@{"):
		return "has \"@{\""
	}
	for i := range len(name) {
		if c := name[i]; c <= ' ' || c == 0x7f || strings.IndexByte("~^:?*[\\", c) >= 0 {
			return fmt.Sprintf("has the character %q", c)
		}
	}
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "":
			return "has an empty component"
		case part[0] == '.':
			return "has a component that begins with a dot"
		case strings.HasSuffix(part, ".lock"):
			return "has a component that ends with \".lock\""
		}
	}
	return ""
}

// CheckObject tells whether name is a full object name: 40 (SHA-1) or 64
// (SHA-256) lower-case hex digits. It wraps ErrInvalid.
func CheckObject(name string) error {
	if len(name) != 40 && len(name) != 64 {
		return fmt.Errorf("%w: %q is not a full object name", ErrInvalid, clip(name))
	}
	for i := range len(name) {
		if c := name[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return fmt.Errorf("%w: %q is not a full object name", ErrInvalid, clip(name))
		}
	}
	return nil
}

// CheckRevision tells whether rev may be given to git rev-parse: a ref, an
// object name or either with ~N, ^N, ^{type}, @{...}; no ranges, no paths, no
// searches through history, no options. It wraps ErrInvalid.
func CheckRevision(rev string) error {
	why := ""
	switch {
	case rev == "":
		why = "is empty"
	case len(rev) > maxRef:
		why = "is too long"
	case rev[0] == '-' || rev[0] == '^':
		why = "begins with " + rev[:1]
	case strings.Contains(rev, ".."):
		why = "is a range"
	case strings.Contains(rev, ":"):
		why = "names a path"
	case strings.Contains(rev, "{/"):
		why = "is a search"
	}
	for i := range len(rev) {
		if c := rev[i]; why == "" && (c <= ' ' || c == 0x7f || strings.IndexByte("?*[\\", c) >= 0) {
			why = fmt.Sprintf("has the character %q", c)
		}
	}
	if why != "" {
		return fmt.Errorf("%w: revision %q %s", ErrInvalid, clip(rev), why)
	}
	return nil
}

// CheckPath tells whether name may be a path inside a tree: relative, in its
// shortest form, no component ".", ".." or ".git". It wraps ErrInvalid.
func CheckPath(name string) error {
	bad := name == "" || name == "." || name[0] == '/' || len(name) > 4096 ||
		strings.IndexByte(name, 0) >= 0 || path.Clean(name) != name ||
		name == ".." || strings.HasPrefix(name, "../")
	for part := range strings.SplitSeq(name, "/") {
		bad = bad || strings.EqualFold(part, ".git")
	}
	if bad {
		return fmt.Errorf("%w: %q is not a path inside a tree", ErrInvalid, clip(name))
	}
	return nil
}

// CheckURL tells whether raw is an absolute URL in one of the schemes, which
// carries no password, and no option for the programs that git starts. With
// "file" among the schemes an absolute path is accepted too. It wraps
// ErrInvalid, without the URL when that holds a password.
func CheckURL(raw string, schemes ...string) error {
	bad := func(why string) error {
		return fmt.Errorf("%w: URL %q %s", ErrInvalid, clip(raw), why)
	}
	switch {
	case raw == "":
		return bad("is empty")
	case len(raw) > maxURL:
		return bad("is too long")
	case raw[0] == '-':
		return bad("begins with a dash")
	case strings.ContainsFunc(raw, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return bad("has control characters")
	case raw[0] == '/':
		if slices.Contains(schemes, "file") {
			return nil
		}
		return bad("is a path")
	}
	u, err := url.Parse(raw)
	if err != nil {
		// The parser's error repeats the URL, which may hold a password.
		return fmt.Errorf("%w: URL cannot be parsed", ErrInvalid)
	}
	if _, has := u.User.Password(); has {
		return fmt.Errorf("%w: URL of host %q holds a password", ErrInvalid, u.Host)
	}
	switch {
	case u.Opaque != "" || !slices.Contains(schemes, u.Scheme):
		return bad("is not of scheme " + strings.Join(schemes, ", "))
	case u.Scheme == "file" && (u.Host != "" && u.Host != "localhost" || !strings.HasPrefix(u.Path, "/")):
		return bad("is not a file of this machine")
	case u.Scheme != "file" && u.Hostname() == "":
		return bad("has no host")
	case strings.HasPrefix(u.Host, "-") || strings.HasPrefix(u.User.Username(), "-"):
		return bad("begins with a dash after the scheme")
	case u.Fragment != "":
		return bad("has a fragment")
	}
	return nil
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}
