package solstice

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/solstice-ci/solstice-go/internal/store"
)

// WaitReason says what a job waits for.
type WaitReason string

// Reasons to wait.
const (
	WaitNeeds    WaitReason = "needs"     // for jobs that it needs
	WaitApproval WaitReason = "approval"  // for its run to be approved
	WaitNoPool   WaitReason = "no_pool"   // no orchestrator that is there serves its label
	WaitPoolFull WaitReason = "pool_full" // it is next, and the pools for its label have no room
	WaitBoots    WaitReason = "boots"     // it is next, and its host boots as many machines as it may at once
	WaitBehind   WaitReason = "behind"    // other jobs come first
	WaitMachine  WaitReason = "machine"   // the machine of its last attempt has to be destroyed first
	WaitBoot     WaitReason = "boot"      // its machine boots
	WaitClaim    WaitReason = "claim"     // there is room: it is about to be taken
)

// Waiting says why a job does not run yet. With a zero Reason it runs, or is
// over.
type Waiting struct {
	Reason  WaitReason `json:"reason,omitempty"`
	Message string     `json:"message,omitempty"` // for people
	Needs   []string   `json:"needs,omitempty"`   // names of jobs that are not over
	// Ahead is how many jobs queued for the same label would be taken before
	// it if all were taken now, at most 1000.
	Ahead int64 `json:"ahead,omitempty"`
}

// Waiting says why a job does not run yet, as of now; an unknown job wraps
// ErrNotFound.
func (e *Engine) Waiting(ctx context.Context, jobID string) (Waiting, error) {
	j, err := e.store.Job(ctx, jobID)
	if err != nil {
		return Waiting{}, e.publicError("job "+jobID, err)
	}
	var w Waiting
	switch j.State {
	case store.JobWaiting:
		w, err = e.waitsForRun(ctx, j)
	case store.JobQueued:
		w, err = e.waitsForMachine(ctx, j)
	case store.JobAssigned:
		w, err = e.waitsForAgent(ctx, j)
	}
	if err != nil {
		return Waiting{}, e.publicError("job "+jobID, err)
	}
	return w, nil
}

func (e *Engine) waitsForRun(ctx context.Context, j *store.Job) (Waiting, error) {
	run, err := e.store.Run(ctx, j.RunID)
	if err != nil {
		return Waiting{}, err
	}
	if run.State == store.RunAwaitingApproval {
		return Waiting{Reason: WaitApproval, Message: "its run awaits approval: " + run.Awaits}, nil
	}
	jobs, err := e.store.Jobs(ctx, j.RunID)
	if err != nil {
		return Waiting{}, err
	}
	w := Waiting{Reason: WaitNeeds}
	needs := decode[[]string](j.Needs)
	for _, n := range jobs {
		if slices.Contains(needs, n.Key) && !n.State.Terminal() {
			w.Needs = append(w.Needs, n.Name)
		}
	}
	w.Message = "waits for " + list(w.Needs)
	return w, nil
}

func (e *Engine) waitsForMachine(ctx context.Context, j *store.Job) (Waiting, error) {
	if j.HoldID != "" {
		return Waiting{Reason: WaitMachine, Message: "the machine of its last attempt, " + j.HoldID + ", has to be destroyed first"}, nil
	}
	pools, err := e.poolInfos(ctx, j.Label)
	if err != nil {
		return Waiting{}, err
	}
	if len(pools) == 0 {
		return Waiting{Reason: WaitNoPool, Message: fmt.Sprintf("no orchestrator that is there has a pool for the label %q", j.Label)}, nil
	}
	var w Waiting
	if w.Ahead, err = e.store.JobsAhead(ctx, j); err != nil {
		return Waiting{}, err
	}
	room := 0
	var use, boots []string
	for _, p := range pools {
		room += max(p.room, 0)
		use = append(use, fmt.Sprintf("%s at %s has %d of %d machines in use", p.Name, p.Host, p.Machines, p.Capacity))
		if p.Problem != "" && p.room <= 0 {
			use[len(use)-1] = fmt.Sprintf("%s at %s: %s", p.Name, p.Host, p.Problem)
		}
		if p.boots != "" {
			boots = append(boots, p.boots)
		}
	}
	switch {
	case w.Ahead > 0:
		w.Reason = WaitBehind
		w.Message = fmt.Sprintf("behind %s for the label %q; %s", count(w.Ahead, "job"), j.Label, strings.Join(use, ", "))
	case room == 0 && len(boots) > 0:
		w.Reason, w.Message = WaitBoots, "it is next: "+strings.Join(boots, ", ")
	case room == 0:
		w.Reason, w.Message = WaitPoolFull, "it is next, and there is no room: "+strings.Join(use, ", ")
	default:
		w.Reason, w.Message = WaitClaim, "there is room: it is about to be taken"
	}
	return w, nil
}

func (e *Engine) waitsForAgent(ctx context.Context, j *store.Job) (Waiting, error) {
	a, err := e.store.Attempt(ctx, j.AttemptID)
	if err != nil {
		return Waiting{}, err
	}
	m, err := e.store.Machine(ctx, a.MachineID)
	if err != nil {
		return Waiting{}, err
	}
	w := Waiting{Reason: WaitBoot, Message: "its machine " + m.ID + " boots"}
	switch {
	case m.State != store.MachineProvisioning:
		w.Message = "the agent in its machine " + m.ID + " has not confirmed yet"
	case m.NonceHash != "":
		w.Message = "the agent in its machine " + m.ID + " enrolled and connects"
	}
	return w, nil
}

// list joins names for people.
func list(names []string) string {
	const shown = 5
	switch n := len(names); {
	case n == 0:
		return "its run to go on"
	case n > shown:
		return strings.Join(names[:shown], ", ") + fmt.Sprintf(" and %d more", n-shown)
	}
	return strings.Join(names, ", ")
}

func count(n int64, what string) string {
	switch {
	case n == 1:
		return "1 " + what
	case n >= store.CountMax:
		return fmt.Sprintf("%d or more %ss", n, what)
	}
	return fmt.Sprintf("%d %ss", n, what)
}
