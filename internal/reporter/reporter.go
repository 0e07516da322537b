// Package reporter brings statuses to forges: of a commit and key one at a time and
// the newest only, again after a failure, and not before the forge wants to hear of
// us. What is still to be reported is rows of the store, so that neither a restart
// nor a forge that is away for a day loses the last word.
package reporter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/grace"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
)

const (
	// atOnce is how many statuses one forge is told at once.
	atOnce = 4
	// firstRetry doubles up to lastRetry.
	firstRetry = time.Second
	lastRetry  = 5 * time.Minute
	// giveUpAfter failures of one version a refused report is left.
	giveUpAfter = 10
)

// Reporter reports the statuses of some forges.
type Reporter struct {
	Store  *store.Store
	Forges map[string]forge.Forge // by instance name
	// Owner is who claims reports, for Lease: what it had claimed when it died is
	// another's after that. A report has half of that time.
	Owner string
	Lease time.Duration
	// Tick is how often it looks without being told.
	Tick   time.Duration
	Logger *slog.Logger
	// Grace is how long reports under way go on after Run's context has ended.
	Grace time.Duration

	mu    sync.Mutex
	kicks map[string]chan struct{}
}

// Accept takes a status; when it returns, it is durable.
func (r *Reporter) Accept(ctx context.Context, s messages.Status) error {
	repo, err := json.Marshal(s.Repo)
	if err != nil {
		return err
	}
	status, err := json.Marshal(s.Status)
	if err != nil {
		return err
	}
	if err := r.Store.WantReport(ctx, store.Report{Forge: s.Forge, RepoName: s.Repo.FullName(), Commit: s.Commit, Key: s.Status.Key, Repo: repo, Status: status, Version: s.Status.Version}); err != nil {
		return err
	}
	select {
	case r.kick(s.Forge) <- struct{}{}:
	default:
	}
	return nil
}

func (r *Reporter) kick(forge string) chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.kicks == nil {
		r.kicks = map[string]chan struct{}{}
	}
	if r.kicks[forge] == nil {
		r.kicks[forge] = make(chan struct{}, 1)
	}
	return r.kicks[forge]
}

// Run reports until ctx ends.
func (r *Reporter) Run(ctx context.Context) {
	var wg sync.WaitGroup
	for name, f := range r.Forges {
		wg.Go(func() { r.run(ctx, name, f) })
	}
	wg.Wait()
}

// run tells one forge, several things at once: one that it is slow to take holds up
// no other.
func (r *Reporter) run(ctx context.Context, name string, f forge.Forge) {
	work, cancel := grace.Context(ctx, r.Grace)
	defer cancel()
	var reports sync.WaitGroup
	defer reports.Wait()
	tick := time.NewTicker(r.Tick)
	defer tick.Stop()
	kick := r.kick(name)
	slots := make(chan struct{}, atOnce)
	pauses := make(chan time.Duration, atOnce)
	for {
		due, err := r.Store.ClaimReports(ctx, name, r.Owner, atOnce-len(slots), r.Lease)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			r.Logger.WarnContext(ctx, "statuses not reported", "forge", name, "error", err)
		}
		for _, d := range due {
			slots <- struct{}{} // there is one
			reports.Go(func() {
				pause, err := r.report(work, f, d)
				if err != nil && work.Err() == nil {
					r.Logger.WarnContext(ctx, "end of a report not written down", "forge", name, "error", err)
				}
				<-slots
				select {
				case pauses <- pause: // which also says that there is room
				case <-ctx.Done():
				}
			})
		}
		if len(due) > 0 && len(slots) < atOnce {
			continue // there may be more
		}
		select {
		case <-ctx.Done():
			return
		case pause := <-pauses:
			if pause > 0 { // of the forge as a whole
				r.Logger.WarnContext(ctx, "the forge wants no statuses for a while", "forge", name, "pause", pause)
				wait(ctx, pause)
			}
		case <-kick:
		case <-tick.C:
		}
	}
}

func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

func (r *Reporter) report(ctx context.Context, f forge.Forge, d *store.Report) (pause time.Duration, err error) {
	var repo forge.Repo
	var s forge.Status
	err = errors.Join(json.Unmarshal(d.Repo, &repo), json.Unmarshal(d.Status, &s))
	if err == nil {
		err = r.tell(ctx, f, repo, d.Commit, s)
	}
	// Said even when we stop just now: what was reported must not be again.
	after, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err == nil {
		return 0, r.Store.Reported(after, d)
	}
	var retry *forge.RetryError
	next := min(firstRetry<<min(d.Failures, 20), lastRetry)
	next += rand.N(next/4 + 1) //nolint:gosec // so that not all come at once
	switch {
	case ctx.Err() != nil:
		next = time.Millisecond
	case errors.As(err, &retry):
		pause = min(max(retry.After, firstRetry), time.Hour)
		next = pause
	case errors.Is(err, forge.ErrNotFound), errors.Is(err, forge.ErrInvalid), errors.Is(err, errors.ErrUnsupported),
		errors.Is(err, forge.ErrPermission) && d.Failures >= giveUpAfter:
		next = 0
	}
	level := slog.LevelWarn
	if ctx.Err() != nil {
		level = slog.LevelDebug
	}
	r.Logger.Log(ctx, level, "status not reported", "forge", d.Forge, "repo", d.RepoName, "commit", d.Commit, "key", d.Key, "again_in", next, "error", err)
	return pause, r.Store.NotReported(after, d, err.Error(), next)
}

// tell calls a driver, whose panic costs one report.
func (r *Reporter) tell(ctx context.Context, f forge.Forge, repo forge.Repo, commit string, s forge.Status) (err error) {
	ctx, cancel := context.WithTimeout(ctx, r.Lease/2)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("reporter: the driver panicked: %v", p)
		}
	}()
	return f.ReportStatus(ctx, repo, commit, s)
}
