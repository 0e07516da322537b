package solstice_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/solstice"
)

// TestFollowJobFrom: a follower goes on at an offset of an attempt, and has all
// of those after it.
func TestFollowJobFrom(t *testing.T) { onBoth(t, testFollowJobFrom) }

func testFollowJobFrom(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	eng, _ := p.start(t, func(cfg *solstice.Config) { cfg.Retries = map[solstice.Class]int{solstice.ClassAgentLost: 1} })
	gate, once := filepath.Join(p.Dir, "gate"), filepath.Join(p.Dir, "once")
	r := p.submit(t, eng, fmt.Sprintf("jobs: { a: { checkout: false, steps: [ { run: 'echo try; while ! test -e %s; do sleep 0.1; done; test -e %s && exit; touch %s; kill -9 $PPID; sleep 600' } ] } }\n", gate, once, once))
	job := r.Jobs[0].ID
	read := func(attempt int, from int64) string {
		t.Helper()
		var b strings.Builder
		for c, err := range eng.FollowJobFrom(t.Context(), job, attempt, from) {
			if err != nil {
				t.Fatal(err)
			}
			if c.Begin {
				fmt.Fprintf(&b, "[%d]", c.Attempt.Number)
			}
			b.Write(c.Chunk.Data)
		}
		return b.String()
	}
	eventually(t, "what it printed is stored", func() bool {
		as, err := eng.Attempts(t.Context(), job)
		return err == nil && len(as) == 1 && as[0].LogSize == int64(len("try\n"))
	})
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if r = finish(t, eng, r.ID); r.State != solstice.RunSucceeded || r.Jobs[0].Attempts != 2 {
		t.Fatalf("run %+v", r)
	}
	for _, c := range []struct {
		attempt int
		from    int64
		want    string
	}{
		{1, 0, "[1]try\n[2]try\n"},
		{1, 2, "[1]y\n[2]try\n"},
		{1, 4, "[1][2]try\n"},
		{2, 0, "[2]try\n"},
		{2, 3, "[2]\n"},
		{3, 0, ""},
	} {
		if got := read(c.attempt, c.from); got != c.want {
			t.Errorf("from %d of attempt %d: %q, want %q", c.from, c.attempt, got, c.want)
		}
	}
	// By the beginning of their IDs, as far as it tells them from others.
	id, err := eng.FindJob(t.Context(), job[:30])
	if err != nil || id != job {
		t.Errorf("job: %q, %v", id, err)
	}
	id, err = eng.FindAttempt(t.Context(), r.Jobs[0].AttemptID[:30])
	if err != nil || id != r.Jobs[0].AttemptID {
		t.Errorf("attempt: %q, %v", id, err)
	}
}
