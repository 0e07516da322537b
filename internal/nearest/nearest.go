// Package nearest guesses what somebody meant by a name that does not exist.
package nearest

import "strings"

// To is the candidate that got is probably a misspelling of, "" when none is
// near. Case does not matter, nor whether words are joined by - or _.
func To(got string, candidates []string) string {
	norm := func(s string) string { return strings.ToLower(strings.ReplaceAll(s, "_", "-")) }
	g := norm(got)
	if len(g) > 256 {
		return ""
	}
	best, distance := "", max(1, len(g)/3)+1
	for _, c := range candidates {
		if d := edits(g, norm(c)); d < distance {
			best, distance = c, d
		}
	}
	return best
}

// edits counts bytes to insert, delete, replace or swap with the next (optimal
// string alignment).
func edits(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
