package solstice

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/relay"
	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

// statuses says what a change means for the forge; it runs inside the
// transaction of the change, so it only looks at its arguments.
func (e *Engine) statuses(run *store.Run, jobs, all []*store.Job) []store.OutboxMessage {
	repo := decode[forge.Repo](run.Repo)
	commit := firstOf(run.Head, run.Commit)
	var out []store.OutboxMessage
	add := func(s forge.Status) {
		m, err := messages.Encode(messages.Status{Forge: run.Forge, Repo: repo, Commit: commit, Status: s})
		if err != nil { // a key too long, say: no reason to hold up the job
			e.log.Error("status not reported", "run_id", run.ID, "key", s.Key, "error", err)
			return
		}
		if run.Trace != "" { // the report belongs to the run's trace
			m.Attributes["traceparent"] = run.Trace
		}
		out = append(out, store.OutboxMessage{
			Key: run.Forge + "/" + repo.FullName() + "/" + commit + "/" + s.Key, Topic: messages.StatusTopic(run.Forge),
			Coalesce: true, ContentType: m.ContentType, Attributes: encode(m.Attributes), Body: m.Body,
		})
	}
	prefix := e.cfg.StatusPrefix + "/" + run.WorkflowName
	for _, j := range jobs {
		if j.State == store.JobWaiting || j.State == store.JobAssigned || j.CopiedFrom != "" {
			continue // says no more than the state before
		}
		add(forge.Status{
			Key: prefix + "/" + j.Name, Version: statusVersion(run), State: jobStatus(j.State), Description: describeJob(j),
			TargetURL: e.targetURL(run.ID, j.ID), ExternalID: j.ID, StartedAt: timeOf(j.StartedAt), FinishedAt: timeOf(j.FinishedAt),
		})
	}
	description := firstOf(run.Reason, describeRun(run.State))
	if run.Note != "" {
		description += " (" + run.Note + ")"
	}
	s := forge.Status{
		Key: prefix, Version: statusVersion(run), State: runStatus(run.State), Description: description,
		TargetURL: e.targetURL(run.ID, ""), ExternalID: run.ID, StartedAt: timeOf(run.StartedAt), FinishedAt: timeOf(run.FinishedAt),
	}
	if run.State == store.RunAwaitingApproval {
		s.Actions = append(s.Actions, forge.ActionApprove)
	}
	if !run.State.Terminal() {
		s.Actions = append(s.Actions, forge.ActionCancel)
	}
	diags := decode[workflow.Diagnostics](run.Diagnostics)
	s.Annotations = annotations(diags)
	if run.State.Terminal() {
		s.Summary = e.summary(diags, all)
	}
	add(s)
	return out
}

// maxAnnotations bounds what is shown of a workflow file that has nothing but errors.
const maxAnnotations = 50

// annotations are the remarks about a workflow file, at their lines.
func annotations(diags workflow.Diagnostics) []forge.Annotation {
	var out []forge.Annotation
	for _, d := range diags[:min(len(diags), maxAnnotations)] {
		a := forge.Annotation{Path: d.Path, Line: d.Line, Column: d.Column, Level: forge.LevelWarning, Message: d.Message}
		if d.Severity == workflow.SeverityError {
			a.Level = forge.LevelFailure
		}
		if d.Hint != "" {
			a.Message += "\n" + d.Hint
		}
		out = append(out, a)
	}
	return out
}

// What a summary has at most: rows of jobs, and bytes, since it is part of a message.
const (
	maxRows    = 200
	maxSummary = 48 << 10
)

// summary is Markdown: what is wrong with the workflow file, and what became of each job,
// those first that did not do well.
func (e *Engine) summary(diags workflow.Diagnostics, jobs []*store.Job) string {
	var b strings.Builder
	for _, d := range diags[:min(len(diags), maxAnnotations)] {
		line := fmt.Sprintf("- %s:%d: %s\n", markdown(d.Path), d.Line, markdown(d.Message))
		if b.Len()+len(line) > maxSummary {
			break
		}
		b.WriteString(line)
	}
	if len(jobs) == 0 {
		return b.String()
	}
	b.WriteString("\n| job | state | ran for | |\n| --- | --- | --- | --- |\n")
	good := func(j *store.Job) int {
		if j.State == store.JobSucceeded || j.State == store.JobSkipped {
			return 1
		}
		return 0
	}
	jobs = slices.SortedStableFunc(slices.Values(jobs), func(a, b *store.Job) int { return good(a) - good(b) })
	shown := 0
	for _, j := range jobs[:min(len(jobs), maxRows)] {
		name, took := markdown(j.Name), ""
		if u := e.targetURL(j.RunID, j.ID); u != "" {
			name = "[" + name + "](" + u + ")"
		}
		if j.StartedAt > 0 && j.FinishedAt > 0 {
			took = time.Duration((j.FinishedAt - j.StartedAt) * 1000).Round(time.Second).String()
		}
		reason, _, _ := strings.Cut(j.Reason, "\n")
		row := fmt.Sprintf("| %s | %s | %s | %s |\n", name, strings.ReplaceAll(string(j.State), "_", " "), took, markdown(reason))
		if b.Len()+len(row) > maxSummary {
			break
		}
		b.WriteString(row)
		shown++
	}
	if n := len(jobs) - shown; n > 0 {
		fmt.Fprintf(&b, "\nand %d more\n", n)
	}
	return strings.TrimPrefix(b.String(), "\n")
}

// markdown makes text that strangers chose stand for itself.
func markdown(text string) string {
	const most = 500
	text = strings.ToValidUTF8(text[:min(len(text), most)], "")
	var b strings.Builder
	for _, c := range text {
		switch {
		case c < ' ':
			c = ' '
		case strings.ContainsRune("\\`*_{}[]()<>#+-!|~@&$:", c):
			b.WriteByte('\\')
		}
		b.WriteRune(c)
	}
	return b.String()
}

// statusVersion orders the reports for one commit and key, over several runs:
// the run's creation in milliseconds, then its own count of changes.
func statusVersion(run *store.Run) int64 { return run.CreatedAt/1000<<20 | min(run.Version, 1<<20-1) }

func (e *Engine) targetURL(run, job string) string {
	if e.cfg.TargetURL == nil {
		return ""
	}
	return e.cfg.TargetURL(run, job)
}

func jobStatus(s store.JobState) forge.StatusState {
	switch s {
	case store.JobRunning:
		return forge.StatusRunning
	case store.JobSucceeded:
		return forge.StatusSuccess
	case store.JobFailed, store.JobTimedOut:
		return forge.StatusFailure
	case store.JobCancelled:
		return forge.StatusCancelled
	case store.JobErrored:
		return forge.StatusError
	case store.JobSkipped:
		return forge.StatusSkipped
	}
	return forge.StatusPending
}

func runStatus(s store.RunState) forge.StatusState {
	switch s {
	case store.RunRunning:
		return forge.StatusRunning
	case store.RunSucceeded:
		return forge.StatusSuccess
	case store.RunFailed:
		return forge.StatusFailure
	case store.RunCancelled:
		return forge.StatusCancelled
	case store.RunErrored:
		return forge.StatusError
	case store.RunSkipped:
		return forge.StatusSkipped
	}
	return forge.StatusPending
}

func describeJob(j *store.Job) string {
	switch {
	case j.Reason != "":
		first, _, _ := strings.Cut(j.Reason, "\n")
		return first
	case j.State == store.JobQueued && j.Attempts > 0:
		return fmt.Sprintf("Queued again after attempt %d", j.Attempts)
	case j.State.Terminal() && j.StartedAt > 0:
		return fmt.Sprintf("%s after %s", sentence(string(j.State)), time.Duration((j.FinishedAt-j.StartedAt)*1000).Round(time.Second))
	}
	return sentence(string(j.State))
}

func describeRun(s store.RunState) string { return sentence(string(s)) }

func sentence(s string) string {
	s = strings.ReplaceAll(s, "_", " ")
	return strings.ToUpper(s[:1]) + s[1:]
}

// wakeEvery is the least time between two wake-ups of other engines: what comes in
// between is merged.
const wakeEvery = 50 * time.Millisecond

// sleep ends early with ctx.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// relayLoop publishes the outbox.
func (e *Engine) relayLoop(ctx context.Context) {
	r := relay.Relay{
		Store: e.store, Queue: e.cfg.Queue, Owner: e.id, Lease: e.cfg.Timing.Lease, Tick: e.cfg.Timing.Tick,
		Kick: e.relayKick.c, Logger: e.log, Noted: e.noted,
	}
	r.Run(ctx)
}

// consumers subscribes to what this engine handles: wake-ups, run requests,
// and the statuses of the forges that it hosts.
func (e *Engine) consumers() ([]func(context.Context), error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	wakes, err := e.cfg.Queue.Subscribe(ctx, messages.TopicWake, queue.SubscribeOptions{})
	if err != nil {
		return nil, fmt.Errorf("solstice: subscribe to %s: %w", messages.TopicWake, err)
	}
	loops := []func(context.Context){func(ctx context.Context) { e.wakeLoop(ctx, wakes) }}
	consume := func(topic string, concurrency int, handle func(context.Context, queue.Message) error, gate func(context.Context, func(context.Context))) {
		c := &queue.Consumer{
			Queue: e.cfg.Queue, Topic: topic, Group: messages.Group, Concurrency: concurrency, Handler: handle,
			Logger: e.log, TracerProvider: e.cfg.TracerProvider, MeterProvider: e.cfg.MeterProvider,
		}
		loops = append(loops, func(ctx context.Context) {
			retry := backoff.NewExponentialBackOff()
			for ctx.Err() == nil {
				began := time.Now()
				gate(ctx, func(ctx context.Context) {
					if err := c.Run(ctx); err != nil && ctx.Err() == nil {
						e.log.ErrorContext(ctx, "consumer ended, starting it again", "topic", topic, "error", err)
					}
				})
				if time.Since(began) > time.Minute {
					retry.Reset()
				}
				select {
				case <-ctx.Done():
				case <-time.After(retry.NextBackOff()):
				}
			}
		})
	}
	if len(e.cfg.Forges) > 0 {
		consume(messages.TopicRunRequest, 4, messages.Handler(e.handleRunRequest), e.withRoom)
	}
	for name := range e.reporter.Forges {
		consume(messages.StatusTopic(name), 4, messages.Handler(e.handleStatus), always)
	}
	return loops, nil
}

func always(ctx context.Context, f func(context.Context)) { f(ctx) }

// wakeLoop hears wake-ups, and subscribes anew when the queue had failed.
func (e *Engine) wakeLoop(ctx context.Context, sub queue.Subscription) {
	retry := backoff.NewExponentialBackOff()
	for {
		if sub != nil {
			e.hearWakes(ctx, sub)
			retry.Reset()
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retry.NextBackOff()):
		}
		var err error
		if sub, err = e.cfg.Queue.Subscribe(ctx, messages.TopicWake, queue.SubscribeOptions{}); err != nil {
			sub = nil
			e.log.WarnContext(ctx, "no wake-ups, the slow tick goes on", "error", err)
		}
	}
}

func (e *Engine) hearWakes(ctx context.Context, sub queue.Subscription) {
	defer func() { _ = sub.Close() }()
	for _, p := range e.pools {
		p.kick.set() // something may have come before we listened
	}
	for {
		d, err := sub.Next(ctx)
		if err != nil {
			if ctx.Err() == nil {
				e.log.WarnContext(ctx, "wake-ups were interrupted", "error", err)
			}
			return
		}
		w, err := messages.Decode[messages.Wake](d.Message())
		switch {
		case err != nil:
			e.log.DebugContext(ctx, "wake-up not understood, the slow tick goes on", "message_id", d.Message().ID, "error", err)
		case w.From != e.id:
			e.heardOf(ctx, w.From)
			e.wakeLocal(w.Labels)
		}
	}
}

// handleRunRequest accepts a run request from a forge integration. It is acked
// after the runs are durable; a repeat finds them by delivery.
func (e *Engine) handleRunRequest(ctx context.Context, m queue.Message, r RunRequest) error {
	if r.IdempotencyKey == "" && r.Event.Delivery == "" {
		if m.ID == "" { // all such would be one
			return queue.Discard(fmt.Errorf("%w: a run request needs a message ID, an idempotency key or a delivery, which tell a repeat", ErrInvalid))
		}
		r.IdempotencyKey = "message/" + m.ID
	}
	var err error
	switch r.Event.Kind {
	case forge.KindRerun, forge.KindCancel, forge.KindApprove:
		err = e.pressed(ctx, r)
	default:
		err = e.submitPatiently(ctx, r)
	}
	switch {
	case errors.Is(err, ErrInvalid), errors.Is(err, forge.ErrNotFound), errors.Is(err, forge.ErrInvalid):
		return queue.Discard(err)
	case errors.Is(err, ErrNoWorkflow):
		e.log.InfoContext(ctx, "run request without a workflow", "repo", r.Repo.FullName(), "commit", r.Commit)
		return nil
	}
	return err
}

// patience is how long a run request is held while the database is away or full,
// which costs it none of its deliveries: shorter than brokers leave a message
// with one reader (RabbitMQ: 30 minutes).
const patience = 10 * time.Minute

func (e *Engine) submitPatiently(ctx context.Context, r RunRequest) error {
	until := time.Now().Add(patience)
	for said := false; ; said = true {
		_, err := e.Submit(ctx, r)
		if !errors.Is(err, ErrNoSpace) && !sqldb.IsRetryable(err) || time.Now().After(until) {
			return err
		}
		if !said {
			e.log.WarnContext(ctx, "run request waits", "repo", r.Repo.FullName(), "commit", r.Commit, "error", err)
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(e.cfg.Timing.Tick):
		}
	}
}

func (e *Engine) handleStatus(ctx context.Context, _ queue.Message, s messages.Status) error {
	if _, ok := e.cfg.Forges[s.Forge]; !ok {
		return fmt.Errorf("solstice: status for forge %q, which is not configured here", s.Forge)
	}
	return e.reporter.Accept(ctx, s)
}

// wakeSender tells the other engines of work, merging what comes while a
// message is on its way. Losing one costs a slow tick, so errors are only
// noted.
type wakeSender struct {
	e      *Engine
	kick   flag
	mu     sync.Mutex
	labels []string
}

func newWakeSender(e *Engine) *wakeSender { return &wakeSender{e: e, kick: newFlag()} }

func (w *wakeSender) send(labels []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range labels {
		if !slices.Contains(w.labels, l) {
			w.labels = append(w.labels, l)
		}
	}
	w.kick.set()
}

func (w *wakeSender) loop(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.kick.c:
		}
		w.mu.Lock()
		labels := w.labels
		w.labels = nil
		w.mu.Unlock()
		if err := w.e.publishWake(ctx, labels); err != nil && ctx.Err() == nil {
			w.e.log.WarnContext(ctx, "wake-up not sent", "error", err)
		}
		sleep(ctx, wakeEvery)
	}
}

// publishWake tells the other engines; ours ignores it.
func (e *Engine) publishWake(ctx context.Context, labels []string) error {
	m, err := messages.Encode(messages.Wake{From: e.id, Labels: labels})
	if err != nil {
		return err
	}
	return e.cfg.Queue.Publish(ctx, messages.TopicWake, []queue.Message{m}, queue.PublishOptions{})
}
