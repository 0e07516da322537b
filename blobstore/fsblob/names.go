package fsblob

import (
	"strings"
)

// How keys become paths. Every key element becomes a directory, the last one a
// file with objectSuffix, so that the keys "a" and "a/b" live side by side.
// Bytes outside [a-z0-9._@+=,-] become %xx, so that names survive file systems
// that fold case or normalise Unicode. An element whose escaped form reaches
// splitAt bytes is continued one directory further down (contSuffix), which
// keeps names below every file system's limit. The escape is applied byte by
// byte, so a common prefix of keys is a common prefix of paths.
const (
	objectSuffix = "~"
	contSuffix   = "~~"
	splitAt      = 120
	emptyElem    = "%" // what follows a split exactly at the end of an element
)

func plain(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || strings.IndexByte("._@+=,-", c) >= 0
}

const hexDigits = "0123456789abcdef"

// split escapes the first bytes of an element up to the point where it has to
// be continued, and returns the rest; more is false when it ends here.
func split(elem string) (name, rest string, more bool) {
	var b strings.Builder
	for i := range len(elem) {
		if c := elem[i]; plain(c) {
			b.WriteByte(c)
		} else {
			b.WriteByte('%')
			b.WriteByte(hexDigits[c>>4])
			b.WriteByte(hexDigits[c&15])
		}
		if b.Len() >= splitAt {
			return b.String(), elem[i+1:], true
		}
	}
	if b.Len() == 0 {
		return emptyElem, "", false
	}
	return b.String(), "", false
}

// objectPath is the slash-separated path of a key's file, and dirPath that of
// the directory which holds the keys below the key.
func objectPath(key string) string { return dirPath(key) + objectSuffix }

func dirPath(key string) string {
	var path strings.Builder
	for elem := range strings.SplitSeq(key, "/") {
		if path.Len() > 0 {
			path.WriteByte('/')
		}
		for {
			name, rest, more := split(elem)
			path.WriteString(name)
			if !more {
				break
			}
			path.WriteString(contSuffix + "/")
			elem = rest
		}
	}
	return path.String()
}

type kind int

const (
	object    kind = iota
	directory      // of a whole element
	continuation
)

// parseName is the inverse for one path element: the bytes of the key element
// (or of its part) and what the name stands for. Names that no key has give
// ok == false.
func parseName(name string, isDir bool) (elem string, k kind, ok bool) {
	enc := name
	switch {
	case strings.HasSuffix(name, contSuffix):
		enc, k = strings.TrimSuffix(name, contSuffix), continuation
	case strings.HasSuffix(name, objectSuffix):
		enc, k = strings.TrimSuffix(name, objectSuffix), object
	default:
		k = directory
	}
	if isDir != (k != object) {
		return "", 0, false
	}
	if enc != emptyElem {
		if elem, ok = unescape(enc); !ok {
			return "", 0, false
		}
	}
	// Only the canonical spelling counts.
	again, rest, more := split(elem)
	return elem, k, again == enc && rest == "" && more == (k == continuation)
}

func unescape(enc string) (string, bool) {
	var b strings.Builder
	for i := 0; i < len(enc); i++ {
		if plain(enc[i]) {
			b.WriteByte(enc[i])
			continue
		}
		if enc[i] != '%' || i+2 >= len(enc) {
			return "", false
		}
		hi, lo := strings.IndexByte(hexDigits, enc[i+1]), strings.IndexByte(hexDigits, enc[i+2])
		if hi < 0 || lo < 0 {
			return "", false
		}
		b.WriteByte(byte(hi<<4 | lo))
		i += 2
	}
	return b.String(), true
}
