package solstice

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
)

// Retention says what is kept, of runs that have ended: a run, its jobs,
// attempts and steps, goes RunAge after its end, its logs go earlier. Ages that
// are zero get the default that is named, and negative ones mean for ever; other
// ages are at least [MinRetention], and nothing goes within that time of its
// run's end.
//
// A run whose jobs' results a rerun keeps stays until the rerun has ended. Then
// it goes by the rules; the rerun has the results still, and its log calls
// wrap [ErrRemoved] for the jobs that it did not run itself.
type Retention struct {
	// RunAge is how long a run is kept. 90 days. A delivery or idempotency key
	// is known as long as its run is.
	RunAge time.Duration
	// RunCount is how many runs of a repository are kept at most. 0: any number.
	RunCount int
	// LogAge is how long the logs of a run are kept. 30 days.
	LogAge time.Duration
	// LogCount is how many runs of a repository keep their logs at most. 0: any
	// number.
	LogCount int
	// Newest is how many of a repository's runs, those that ended last, stay
	// with their logs whatever their age. 10; negative: none.
	Newest int
	// DeliveryAge is how long messages are kept that could not be delivered:
	// dead letters of run requests and statuses, and what waits to be published; and
	// the webhooks that came, and what forges were told.
	// 14 days.
	DeliveryAge time.Duration
}

// MinRetention is the shortest age that anything is removed at, so that nobody
// can still be about to write to it.
const MinRetention = time.Hour

func (r *Retention) fill() error {
	const day = 24 * time.Hour
	orDefault(&r.RunAge, 90*day)
	orDefault(&r.LogAge, 30*day)
	orDefault(&r.Newest, 10)
	orDefault(&r.DeliveryAge, 14*day)
	var errs []error
	for name, age := range map[string]time.Duration{"RunAge": r.RunAge, "LogAge": r.LogAge, "DeliveryAge": r.DeliveryAge} {
		if age > 0 && age < MinRetention {
			errs = append(errs, fmt.Errorf("solstice: Config.Retention.%s is %s, at least %s is needed", name, age, MinRetention))
		}
	}
	if r.RunCount < 0 || r.LogCount < 0 {
		errs = append(errs, errors.New("solstice: Config.Retention has a negative count"))
	}
	return errors.Join(errs...)
}

// rule is the store's form of an age and a count.
func (r *Retention) rule(now int64, age time.Duration, count int) store.Rule {
	out := store.Rule{Most: -1, Newest: max(r.Newest, 0), Until: now - MinRetention.Microseconds()}
	if age > 0 {
		out.Before = now - age.Microseconds()
	}
	if count > 0 {
		out.Most = count
	}
	return out
}

// How long is kept what nobody asks for any more.
const (
	recordAge = 24 * time.Hour      // machines that are gone, expired leases, engines that were killed
	tokenAge  = 30 * 24 * time.Hour // tokens that have expired
)

const (
	// collectorTTL is how long a collector that died keeps others waiting.
	collectorTTL = time.Minute
	// A pass ends after so many runs, and gives others a chance at the lease.
	collectorRuns = 500
	// lookAgain is how often every repository is looked at, and the blob store
	// searched for what nothing lists, besides those that something happened to.
	lookAgain = 24 * time.Hour
	// sweepAge is well above the time that an object is stored but not listed.
	sweepAge = time.Hour
	// putAge is well above the time that storing an object may take.
	putAge = 24 * time.Hour
	// batches of a transaction, of runs and of jobs
	markBatch, jobBatch, leftoverBatch = 50, 20, 100
)

// collectLoop removes what retention lets go, in one engine at a time.
func (e *Engine) collectLoop(ctx context.Context) {
	c := &collector{e: e}
	for {
		more, err := c.pass(ctx)
		if err != nil && ctx.Err() == nil {
			e.log.WarnContext(ctx, "retention: not everything was removed that may go", "error", err)
		}
		pause := e.cfg.Timing.Collect
		if more && err == nil {
			pause = min(pause, time.Second)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// collector is what an engine remembers from one pass to the next.
type collector struct {
	e      *Engine
	looked time.Time // when every repository was looked at; zero: never
	upTo   int64     // ends of runs, and of their ages, are known up to then
	repos  []string  // to be looked at
	heldAt time.Time // when the lease was renewed

	failed map[string]error // runs that could not be removed in this pass, by ID

	runs, logs, messages, objects int64 // removed in this pass
	rest                          store.Removed
}

// errNotCollector ends a pass whose lease went to another engine.
var errNotCollector = errors.New("another engine has taken retention over")

// hold takes or renews the lease. Two collectors would do no harm; the lease
// saves the work and keeps a backup's logs in place.
func (c *collector) hold(ctx context.Context) error {
	if time.Since(c.heldAt) < collectorTTL/4 {
		return nil
	}
	now := time.Now()
	mine, err := c.e.store.Lease(ctx, store.CollectorLease, c.e.id, collectorTTL)
	if err == nil && !mine {
		err = errNotCollector
	}
	if err == nil {
		c.heldAt = now
	}
	return err
}

// pass removes what may go, up to a bound; more says that it was reached.
func (c *collector) pass(ctx context.Context) (more bool, err error) {
	c.heldAt = time.Time{}
	switch err := c.hold(ctx); {
	case errors.Is(err, errNotCollector):
		return false, nil
	case err != nil:
		return false, err
	}
	c.runs, c.logs, c.messages, c.objects, c.rest = 0, 0, 0, 0, store.Removed{}
	c.failed = map[string]error{}
	more, err = c.collect(ctx)
	for id, ferr := range c.failed {
		err = errors.Join(err, fmt.Errorf("run %s: %w", id, ferr))
	}
	after, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	err = errors.Join(err, c.e.store.Unlease(after, store.CollectorLease, c.e.id))
	if errors.Is(err, errNotCollector) {
		more, err = false, nil
	}
	err = errors.Join(err, c.sweep(ctx))
	c.report(ctx)
	return more, err
}

func (c *collector) collect(ctx context.Context) (more bool, err error) {
	if err := c.remove(ctx); err != nil { // what an earlier pass marked
		return false, err
	}
	if err := c.due(ctx); err != nil {
		return false, err
	}
	for len(c.repos) > 0 && !more && !c.stuck() {
		if more, err = c.repository(ctx, c.repos[0]); err != nil {
			return false, err
		}
		if !more && !c.stuck() {
			c.repos = c.repos[1:]
		}
	}
	return more, errors.Join(c.leftovers(ctx), c.letters(ctx))
}

// stuck says that it is not about single runs: no more are marked then.
func (c *collector) stuck() bool { return len(c.failed) >= markBatch }

// due adds the repositories in which something may go by now: where a run has
// ended, which pushes others out, or has come of an age since the last time.
func (c *collector) due(ctx context.Context) error {
	e, r := c.e, c.e.cfg.Retention
	now, err := e.store.Now(ctx)
	if err != nil {
		return err
	}
	found := c.repos
	if c.looked.IsZero() || time.Since(c.looked) >= lookAgain {
		for after := ""; ; {
			some, err := e.store.EndedRepos(ctx, after, 100)
			if err != nil {
				return err
			}
			if len(some) == 0 {
				break
			}
			found = append(found, some...)
			after = some[len(some)-1]
		}
		c.looked = time.Now()
	} else {
		// A transaction's end may become visible after that of a later one.
		const late = int64(5 * time.Minute / time.Microsecond)
		for _, age := range []time.Duration{0, MinRetention, r.LogAge, r.RunAge} {
			if age < 0 {
				continue
			}
			some, err := e.store.ReposEnded(ctx, c.upTo-late-age.Microseconds(), now-age.Microseconds())
			if err != nil {
				return err
			}
			found = append(found, some...)
		}
	}
	slices.Sort(found)
	c.repos, c.upTo = slices.Compact(found), now
	return nil
}

// repository removes what may go of one repository. more: not all of it.
func (c *collector) repository(ctx context.Context, repo string) (more bool, err error) {
	e, r := c.e, &c.e.cfg.Retention
	now, err := e.store.Now(ctx)
	if err != nil {
		return false, err
	}
	for _, m := range []struct {
		mark func(context.Context, string, store.Rule, int) (int, error)
		rule store.Rule
	}{
		{e.store.MarkRuns, r.rule(now, r.RunAge, r.RunCount)},
		{e.store.MarkLogs, r.rule(now, r.LogAge, r.LogCount)},
	} {
		for {
			if err := c.hold(ctx); err != nil {
				return false, err
			}
			n, err := m.mark(ctx, repo, m.rule, markBatch)
			if err != nil {
				return false, err
			}
			if n == 0 {
				break
			}
			if err := c.remove(ctx); err != nil {
				return false, err
			}
			if c.runs+c.logs >= collectorRuns || c.stuck() {
				return !c.stuck(), nil
			}
		}
	}
	return false, nil
}

// remove brings to its end what was marked. A run that cannot be removed now
// does not keep the others; it is tried again in the next pass.
func (c *collector) remove(ctx context.Context) error {
	for after := ""; ; {
		runs, err := c.e.store.Leaving(ctx, after, markBatch)
		if err != nil || len(runs) == 0 {
			return err
		}
		for _, run := range runs {
			after = run.ID
			if c.failed[run.ID] != nil {
				continue
			}
			switch err := c.removeRun(ctx, run); {
			case errors.Is(err, errNotCollector) || ctx.Err() != nil:
				return errors.Join(err, ctx.Err())
			case err != nil:
				c.failed[run.ID] = err
			}
		}
	}
}

// removeRun deletes the logs of a run marked for that, or all of it. At every
// moment what is left to delete is named by rows that are left: streams go
// before the attempts that name them, jobs before their run.
func (c *collector) removeRun(ctx context.Context, run *store.Run) error {
	e := c.e
	for after := -1; ; {
		if err := c.hold(ctx); err != nil {
			return err
		}
		jobs, err := e.store.JobStreams(ctx, run.ID, after, jobBatch)
		if err != nil {
			return err
		}
		if len(jobs) == 0 {
			break
		}
		var ids []string
		for _, j := range jobs {
			ids, after = append(ids, j.JobID), j.Idx
			for _, stream := range j.Streams {
				// Again, where only the logs went before: a writer may have been late.
				if err := e.logs.Delete(ctx, stream); err != nil {
					return fmt.Errorf("delete log: %w", err)
				}
			}
		}
		if run.Retention == store.RunGoing {
			if err := e.store.DeleteJobs(ctx, run.ID, ids); err != nil {
				return err
			}
		}
	}
	if run.Retention == store.LogsGoing {
		if err := e.store.LogsDeleted(ctx, run.ID); err != nil {
			return err
		}
		c.logs++
		return nil
	}
	if err := c.forgetStatuses(ctx, run); err != nil {
		return err
	}
	if err := e.store.DeleteRun(ctx, run.ID); err != nil {
		return err
	}
	c.runs++
	return nil
}

// forgetStatuses drops what a forge of ours keeps beside a commit, with its
// last run.
func (c *collector) forgetStatuses(ctx context.Context, run *store.Run) error {
	f, ok := c.e.cfg.Forges[run.Forge]
	if !ok {
		return nil
	}
	keeper, ok := forge.As[forge.StatusForgetter](f)
	if !ok {
		return nil
	}
	if last, err := c.e.store.LastOfCommit(ctx, run); err != nil || !last {
		return err
	}
	err := keeper.ForgetStatuses(ctx, decode[forge.Repo](run.Repo), run.Commit)
	if errors.Is(err, forge.ErrInvalid) { // then there are none
		return nil
	}
	return err
}

// leftovers removes what stays behind of machines, engines and clients.
func (c *collector) leftovers(ctx context.Context) error {
	l := store.Leftovers{Records: recordAge, Tokens: tokenAge, Undelivered: c.e.cfg.Retention.DeliveryAge}
	for {
		if err := c.hold(ctx); err != nil {
			return err
		}
		n, err := c.e.store.RemoveLeftovers(ctx, l, leftoverBatch)
		c.rest.Machines, c.rest.Undelivered, c.rest.Others = c.rest.Machines+n.Machines, c.rest.Undelivered+n.Undelivered, c.rest.Others+n.Others
		if err != nil || max(n.Machines, n.Undelivered, n.Others) < leftoverBatch {
			return err
		}
	}
}

// letters drops old dead letters of the topics that this engine consumes.
func (c *collector) letters(ctx context.Context) error {
	age := c.e.cfg.Retention.DeliveryAge
	q, ok := queue.As[queue.DeadLetterer](c.e.cfg.Queue)
	if !ok || age < 0 {
		return nil
	}
	now, err := c.e.store.Now(ctx)
	if err != nil {
		return err
	}
	before := timeOf(now - age.Microseconds())
	topics := []string{messages.TopicRunRequest}
	for name := range c.e.cfg.Forges {
		topics = append(topics, messages.StatusTopic(name))
	}
	for _, topic := range topics {
		for {
			letters, err := q.DeadLetters(ctx, topic, messages.Group, leftoverBatch)
			if err != nil {
				return fmt.Errorf("dead letters of %s: %w", topic, err)
			}
			var ids []string
			for _, l := range letters { // oldest first
				if l.Time.Before(before) {
					ids = append(ids, l.Message.ID)
				}
			}
			if len(ids) == 0 {
				break
			}
			n, err := q.Drop(ctx, topic, messages.Group, ids...)
			if err != nil {
				return fmt.Errorf("dead letters of %s: %w", topic, err)
			}
			c.messages += int64(n)
			if n == 0 {
				break
			}
		}
	}
	return nil
}

// sweep searches the blob store for objects that nothing lists, which crashed
// and fenced writers leave, and for what Puts left that never ended. It reads
// the names of all objects, so one engine does it, once in a while; it needs no
// other lease.
func (c *collector) sweep(ctx context.Context) error {
	type sweeper interface {
		Sweep(ctx context.Context, minAge time.Duration) (removed int, err error)
	}
	logs, isLogs := c.e.logs.(sweeper)
	var blobs blobstore.Sweeper
	isBlobs := false
	if c.e.cfg.Blobs != nil {
		blobs, isBlobs = blobstore.As[blobstore.Sweeper](c.e.cfg.Blobs)
	}
	if !isLogs && !isBlobs {
		return nil
	}
	// A new owner each time: it is not to be renewed.
	if mine, err := c.e.store.Lease(ctx, "retention/sweep", newID(), lookAgain); err != nil || !mine {
		return err
	}
	var errs []error
	swept := func(s sweeper, minAge time.Duration) {
		n, err := s.Sweep(ctx, minAge)
		c.objects += int64(n)
		errs = append(errs, err)
	}
	if isLogs {
		swept(logs, sweepAge)
	}
	if isBlobs {
		swept(blobs, putAge)
	}
	return errors.Join(errs...)
}

// report counts what was removed, and says so if it is anything.
func (c *collector) report(ctx context.Context) {
	var said []any
	for _, k := range []struct {
		kind string
		n    int64
	}{
		{"runs", c.runs},
		{"logs", c.logs},
		{"messages", c.messages + c.rest.Undelivered},
		{"machines", c.rest.Machines},
		{"objects", c.objects}, // of the blob store, which nothing listed or which never ended
		{"others", c.rest.Others},
	} {
		if k.n > 0 {
			c.e.metrics.retentionRemoved(k.kind, k.n)
			said = append(said, k.kind, k.n)
		}
	}
	if len(said) > 0 {
		c.e.log.InfoContext(ctx, "removed by retention", said...)
	}
}
