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

// edits is Levenshtein's distance in bytes.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
