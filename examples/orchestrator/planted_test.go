package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// startOfConfig is where the program makes the engine's configuration.
const startOfConfig = `DB: db, Logger: log, `

// edit replaces a text of a source file, which has to be there exactly once.
type edit struct{ file, old, new string }

// plant builds the program with changes to its source, which stays as it is.
func plant(t *testing.T, name string, edits ...edit) (string, error) {
	t.Helper()
	changed := map[string]string{}
	for _, e := range edits {
		path, err := filepath.Abs(filepath.FromSlash(e.file))
		if err != nil {
			return "", err
		}
		source, ok := changed[path]
		if !ok {
			b, err := os.ReadFile(path)
			if err != nil {
				return "", err
			}
			source = string(b)
		}
		if n := strings.Count(source, e.old); n != 1 {
			return "", fmt.Errorf("%s has %d times what is to be changed:\n%s", e.file, n, e.old)
		}
		changed[path] = strings.Replace(source, e.old, e.new, 1)
	}
	dir := t.TempDir()
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	for path, source := range changed {
		overlay.Replace[path] = filepath.Join(dir, fmt.Sprintf("%d.go", len(overlay.Replace)))
		if err := os.WriteFile(overlay.Replace[path], []byte(source), 0o600); err != nil {
			return "", err
		}
	}
	b, err := json.Marshal(overlay)
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		return "", err
	}
	return build(name, "-overlay", file)
}

// Three bugs of the kind that a crash shows, each in two parts: one that makes
// the instant longer at which a crash shows it, and the bug. With the first
// alone everything has to be right.
var (
	slowCommit = edit{
		file: "../../solstice/session.go",
		old: `	s.stored, s.logSize = b.last, size
`,
		new: `	time.Sleep(100 * time.Millisecond)
	s.stored, s.logSize = b.last, size
`,
	}
	ackBeforeCommit = edit{
		file: "../../solstice/session.go",
		old: `	size := b.off + int64(len(b.data))
`,
		new: `	size := b.off + int64(len(b.data))
	if b.finished == nil {
		if err := s.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Ack{Ack: &agentv1.Ack{Seq: b.last}}}); err != nil {
			return false, err
		}
	}
`,
	}

	slowPublish = edit{
		file: "../../internal/relay/relay.go",
		old: `	var done []int64
	var errs []error
`,
		new: `	time.Sleep(300 * time.Millisecond)
	var done []int64
	var errs []error
`,
	}
	outboxRowDropped = edit{
		file: "../../internal/relay/relay.go",
		old: `	byTopic := map[string][]*store.OutboxMessage{}
	for _, m := range msgs {
`,
		new: `	byTopic := map[string][]*store.OutboxMessage{}
	for _, m := range msgs {
		if err := r.Store.OutboxDone(ctx, m.ID); err != nil {
			return 0, err
		}
	}
	for _, m := range msgs {
`,
	}

	// A reaper that acts on what it read before the agents came back.
	slowReaper = edit{
		file: "../../solstice/reap.go",
		old: `	defer tick.Stop()
	r := reaper{`,
		new: `	defer tick.Stop()
	if due, err := e.store.Overdue(ctx, 0); err == nil {
		for _, a := range due.Lost {
			for range 2000 {
				if now, err := e.store.Attempt(ctx, a.ID); err == nil && now.Epoch != a.Epoch {
					e.lose(ctx, a, ClassAgentLost, "its agent was not heard of", "")
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
	}
	r := reaper{`,
	}
	epochNotChecked = edit{
		file: "../../solstice/machines.go",
		old:  ` || now.Epoch != a.Epoch {`,
		new:  ` {`,
	}
)

// whenNoted kills soon after a job noted that it begins or ends.
func whenNoted(ctx context.Context, c *crash, v *process) {
	size := func() (n int64) {
		files, _ := os.ReadDir(c.hist.out)
		for _, f := range files {
			if info, err := f.Info(); err == nil {
				n += info.Size()
			}
		}
		return n
	}
	select {
	case <-v.Started:
	case <-v.Ended:
		return
	}
	for before := size(); size() == before && ctx.Err() == nil; {
		wait(ctx, 5*time.Millisecond)
	}
	wait(ctx, c.upTo(300*time.Millisecond))
}

// TestChecker plants bugs, and has the checker find each of them, and nothing
// where there is none.
func TestChecker(t *testing.T) {
	timing := edit{file: "main.go", old: startOfConfig, new: shortTiming + startOfConfig}
	for _, p := range []struct {
		name  string
		edits []edit
		pause string // in jobs; s
		kills int
		finds string // empty: nothing
	}{
		{"none", []edit{slowCommit, slowPublish, slowReaper}, "2", 4, ""},
		{"ack-before-commit", []edit{slowCommit, ackBeforeCommit}, "0.2", 4, "did not run once"},
		{"outbox-row-dropped", []edit{slowPublish, outboxRowDropped}, "0.2", 6, "the forge was told|statuses"},
		{"epoch-not-checked", []edit{slowReaper, epochNotChecked}, "2", 2, "did not run once"},
	} {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel() // most of the time jobs pause
			exe, err := plant(t, p.name, append(p.edits, timing)...)
			if err != nil {
				t.Fatal(err)
			}
			var found string
			for range 3 { // a kill may miss the instant
				c := newCrash(t, exe)
				c.instant, c.hist.pause = whenNoted, p.pause
				found = strings.Join(c.run(p.kills), "\n")
				if p.finds == "" {
					if found != "" {
						t.Errorf("found where nothing is planted:\n%s", found)
					}
					return
				}
				if regexp.MustCompile(p.finds).MatchString(found) {
					return
				}
			}
			t.Errorf("not found; the last time:\n%s", found)
		})
	}
}
