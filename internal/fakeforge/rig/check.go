package rig

import (
	"fmt"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
)

// Setup is a way in which a forge may be set up, and what is to be found.
type Setup struct {
	Level forge.Level // of the worst finding
	Says  []string    // what findings and advice of that level contain, each
}

// Check looks at the set-up of a forge; none of secrets may be told.
func (s Setup) Check(t *testing.T, c forge.Checker, o forge.CheckOptions, secrets ...string) {
	t.Helper()
	found, err := c.Check(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	rank := map[forge.Level]int{forge.LevelNotice: 1, forge.LevelWarning: 2, forge.LevelFailure: 3}
	var worst forge.Level
	texts := map[forge.Level]string{}
	for _, f := range found {
		if rank[f.Level] == 0 || f.What == "" || strings.HasSuffix(f.What, ".") || f.Level != forge.LevelNotice && f.Advice == "" {
			t.Errorf("finding %+v", f)
		}
		if rank[f.Level] > rank[worst] {
			worst = f.Level
		}
		texts[f.Level] += f.What + ": " + f.Advice + "\n"
	}
	if worst != s.Level {
		t.Errorf("the worst finding is a %s, want a %s:\n%v", worst, s.Level, texts)
	}
	for _, part := range s.Says {
		if !strings.Contains(texts[s.Level], part) {
			t.Errorf("no %s says %q:\n%s", s.Level, part, texts[s.Level])
		}
	}
	for _, secret := range secrets {
		if strings.Contains(fmt.Sprint(found), secret) {
			t.Errorf("a secret is told: %+v", found)
		}
	}
}
