package s3blob

import (
	"strings"
	"unicode/utf8"
)

// How keys become names in the bucket: prefix, key, "!". Many services keep
// objects in a file system, where "a" and "a/b" cannot both be; with the mark at
// its end no name is a directory of another. In keys, what sorts up to the mark
// is escaped by what sorts just above it: ' ' as `"0`, '!' as `"1` and '"' as
// `"2`. So names sort as keys do, and a common prefix of keys is one of names.
const mark = "!"

var escaper = strings.NewReplacer(" ", `"0`, "!", `"1`, `"`, `"2`)

func (s *Store) name(key string) string { return s.o.Prefix + escaper.Replace(key) + mark }

// key is the inverse; ok is false for names that are not ours.
func (s *Store) key(name string) (key string, ok bool) {
	name, ok = strings.CutPrefix(name, s.o.Prefix)
	if !ok {
		return "", false
	}
	name, ok = strings.CutSuffix(name, mark)
	if !ok || strings.ContainsAny(name, " !") {
		return "", false
	}
	head, rest, escaped := strings.Cut(name, `"`)
	if !escaped {
		return name, true
	}
	var b strings.Builder
	for ; escaped; head, rest, escaped = strings.Cut(rest, `"`) {
		b.WriteString(head)
		if rest == "" || rest[0] < '0' || rest[0] > '2' {
			return "", false
		}
		b.WriteByte(" !\""[rest[0]-'0'])
		rest = rest[1:]
	}
	b.WriteString(head)
	return b.String(), true
}

// valid is the longest beginning of s that can be sent: what is not UTF-8
// cannot be part of a query.
func valid(s string) string {
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		if r == utf8.RuneError && n <= 1 {
			return s[:i]
		}
		i += n
	}
	return s
}
