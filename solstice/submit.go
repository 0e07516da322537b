package solstice

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

// Errors of Submit, Cancel, Rerun and the reading methods.
var (
	// ErrNotFound: no such run, job or attempt.
	ErrNotFound = errors.New("solstice: not found")
	// ErrRemoved: it was there, and retention has removed it.
	ErrRemoved = fmt.Errorf("%w, removed by retention", ErrNotFound)
	// ErrNoWorkflow: the commit has no workflow file.
	ErrNoWorkflow = errors.New("solstice: no workflow file")
	// ErrInvalid: the request cannot be carried out as it is.
	ErrInvalid = errors.New("solstice: invalid request")
	// ErrOver: the run is over already, or not over yet where that is needed.
	ErrOver = errors.New("solstice: run is not in a state for this")
)

// RunRequest asks for the workflows of a commit to be run. It is also a message:
// an engine with forges takes those that come through the queue.
type RunRequest = messages.RunRequest

// Submit plans the workflows that a request concerns and accepts them as runs:
// when it returns, they are durable. A workflow file with errors becomes a run
// in state errored that carries the diagnostics. No run at all means that no
// workflow is concerned by the event. Errors wrap ErrNoWorkflow, ErrInvalid,
// ErrNoSpace, or what the forge reported. Nothing was accepted then, unless
// several files were concerned and the database failed between them: the same
// request again, by its idempotency key or delivery, finds those that were.
func (e *Engine) Submit(ctx context.Context, r RunRequest) (runs []Run, err error) {
	ctx, span := e.tracer.Start(ctx, "run.submit", trace.WithAttributes(attribute.String("forge", r.Forge), attribute.String("repo", r.Repo.FullName())))
	defer func() {
		if err != nil {
			span.SetStatus(codes.Error, err.Error())
		}
		span.End()
	}()
	if err := e.space.err(); err != nil {
		return nil, err
	}
	f, err := e.forgeOf(&r)
	if err != nil {
		return nil, err
	}
	if r.Event.Kind == "" {
		r.Event.Kind = forge.KindManual
	}
	if r.Commit == "" {
		r.Commit = r.Event.Commit
	}
	if r.Ref == "" {
		r.Ref = r.Event.Ref
	}
	if r.Commit == "" {
		if r.Commit, err = f.Resolve(ctx, r.Repo, firstOf(r.Ref, "HEAD")); err != nil {
			return nil, fmt.Errorf("solstice: resolve %q: %w", firstOf(r.Ref, "HEAD"), err)
		}
	}
	if why := unwanted(r.Event); why != "" && r.Workflow == "" {
		e.log.InfoContext(ctx, "event starts nothing", "repo", r.Repo.FullName(), "commit", r.Commit, "why", why)
		return nil, nil
	}
	about, err := e.subjectOf(ctx, f, r)
	if err != nil {
		return nil, err
	}
	r.Commit = about.commit
	r.Event.Commit, r.Event.Ref, r.Event.Repo = r.Commit, r.Ref, r.Repo

	files, err := workflowFiles(ctx, f, r.Repo, about.workflows)
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%w: commit %.12s of %s has neither %s nor a file in %s/", ErrNoWorkflow, about.workflows, r.Repo.FullName(), workflow.File, workflow.Dir)
	}
	var known []string
	found := false
	trigger := triggerOf(r.Event)
	paths := sync.OnceValues(func() ([]string, error) { return changedPaths(ctx, f, r, about) })
	for _, file := range slices.Sorted(maps.Keys(files)) {
		w, diags := workflow.Parse(file, files[file])
		base := path.Base(file)
		stem := strings.TrimSuffix(base, path.Ext(base))
		switch {
		case diags.HasErrors(): // which may hide its name
			known = append(known, file+" (which has errors)")
		case w.Name != stem:
			known = append(known, fmt.Sprintf("%s (%s)", file, w.Name))
		default:
			known = append(known, file)
		}
		if r.Workflow == "" && asksForPaths(w, r.Event.Kind) {
			if trigger.ChangedPaths, err = paths(); err != nil {
				return runs, err
			}
		}
		if r.Workflow != "" {
			if r.Workflow != file && r.Workflow != w.Name && r.Workflow != base && r.Workflow != stem {
				continue
			}
		} else if ok, why := w.Match(trigger); !ok {
			e.log.DebugContext(ctx, "workflow not concerned", "workflow", file, "why", why)
			continue
		}
		found = true
		run, err := e.accept(ctx, r, about, w, diags)
		if err != nil {
			return runs, e.noted(err)
		}
		runs = append(runs, run)
	}
	if r.Workflow != "" && !found {
		return nil, fmt.Errorf("%w: there is no workflow %q; the commit has %s", ErrInvalid, r.Workflow, strings.Join(known, ", "))
	}
	return runs, nil
}

func (e *Engine) forgeOf(r *RunRequest) (forge.Forge, error) {
	if r.Forge == "" && len(e.cfg.Forges) == 1 {
		for name := range e.cfg.Forges {
			r.Forge = name
		}
	}
	f, ok := e.cfg.Forges[r.Forge]
	if !ok {
		return nil, fmt.Errorf("%w: no forge %q is configured; there are: %s", ErrInvalid, r.Forge,
			firstOf(strings.Join(slices.Sorted(maps.Keys(e.cfg.Forges)), ", "), "none"))
	}
	return f, nil
}

func workflowFiles(ctx context.Context, f forge.Forge, repo forge.Repo, commit string) (map[string][]byte, error) {
	names, err := f.ListFiles(ctx, repo, commit, workflow.Dir)
	if err != nil {
		return nil, fmt.Errorf("solstice: list %s at %.12s: %w", workflow.Dir, commit, err)
	}
	paths := []string{workflow.File}
	for _, n := range names {
		if p := path.Join(workflow.Dir, n); workflow.IsFile(p) {
			paths = append(paths, p)
		}
	}
	files := map[string][]byte{}
	for _, p := range paths {
		b, err := f.ReadFile(ctx, repo, commit, p)
		if errors.Is(err, forge.ErrNotFound) && p == workflow.File {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("solstice: read %s at %.12s: %w", p, commit, err)
		}
		files[p] = b
	}
	return files, nil
}

func triggerOf(ev forge.Event) workflow.Trigger {
	t := workflow.Trigger{Kind: workflow.TriggerKind(ev.Kind), Ref: ev.Ref, ChangedPaths: ev.ChangedPaths}
	if ev.PullRequest != nil {
		t.BaseRef = ev.PullRequest.BaseRef
	}
	return t
}

// accept plans one workflow and writes the run, or finds the one that an
// earlier delivery of the same request made.
func (e *Engine) accept(ctx context.Context, r RunRequest, about subject, w *workflow.Workflow, diags workflow.Diagnostics) (Run, error) {
	run := &store.Run{
		ID: newID(), State: store.RunQueued, Forge: r.Forge, Repo: encode(r.Repo), RepoKey: r.Forge + "/" + r.Repo.FullName(),
		Commit: r.Commit, Ref: r.Ref, Event: encode(r.Event), Delivery: r.Event.Delivery, IdempotencyKey: r.IdempotencyKey,
		WorkflowPath: w.Path, WorkflowName: w.Name, Priority: r.Priority, Trace: traceParent(ctx),
		Head: about.head, Note: about.note,
	}
	var jobs []*store.Job
	cancelOlder := false
	if !diags.HasErrors() {
		var plan *workflow.Plan
		var more workflow.Diagnostics
		plan, more = w.Plan(workflow.PlanOptions{Trigger: triggerOf(r.Event).Kind, Inputs: r.Inputs, Jobs: r.Jobs, Contexts: runContexts(run)})
		diags = append(diags, more...)
		if !more.HasErrors() {
			run.Inputs = encode(plan.Inputs)
			jobs = plannedJobs(run, plan)
			run.Concurrency, cancelOlder = groupOf(r, w.Path, plan.Concurrency)
		}
	}
	if diags.HasErrors() {
		run.State, run.Reason = store.RunErrored, diags.Err().Error()
	}
	if len(diags) > 0 {
		run.Diagnostics = encode(diags)
	}
	if !run.State.Terminal() {
		awaitApproval(run, about.awaits)
	}
	enterGroup(run)
	applyDecisions(run, jobs)
	err := e.store.InsertRun(ctx, run, jobs)
	duplicate := errors.Is(err, store.ErrDuplicate)
	if duplicate {
		if run, err = e.store.RunByKey(ctx, run.Forge, run.Delivery, run.IdempotencyKey, run.WorkflowPath); err != nil {
			return Run{}, fmt.Errorf("solstice: find the run of an earlier delivery: %w", err)
		}
	}
	if err != nil {
		return Run{}, fmt.Errorf("solstice: accept run: %w", err)
	}
	// What waits for approval ends nothing but older runs of its own pull request.
	harmless := run.State != store.RunAwaitingApproval || strings.HasPrefix(run.Concurrency, pullGroup)
	if run.Concurrency != "" && !run.State.Terminal() && harmless { // of a duplicate, too: it may have been cut off here
		if err := e.supersede(ctx, run, cancelOlder); err != nil {
			return Run{}, fmt.Errorf("solstice: end older runs of the concurrency group: %w", err)
		}
		if err := e.begin(ctx, run.ID); err != nil {
			return Run{}, err
		}
		duplicate = true // it may have gone on
	}
	if duplicate {
		e.groupKick.set()
		e.relayKick.set()
		return e.GetRun(ctx, run.ID)
	}
	if !slices.ContainsFunc(jobs, func(j *store.Job) bool { return !j.State.Terminal() }) && !run.State.Terminal() {
		// Nothing to run: the state follows from the jobs, as at any other end.
		if err := e.withRun(ctx, run.ID, func(context.Context, *store.RunTx) error { return nil }); err != nil {
			return Run{}, err
		}
		return e.GetRun(ctx, run.ID)
	}
	e.changed(store.Change{Run: run, Jobs: jobs, Labels: queuedLabels(jobs)})
	return publicRun(run, jobs), nil
}

// awaitApproval has a run that is not in the store yet wait for approval, if
// there is a reason to.
func awaitApproval(run *store.Run, reason string) {
	if reason != "" {
		run.State, run.Awaits, run.Reason = store.RunAwaitingApproval, reason, "Awaits approval: "+reason
	}
}

func plannedJobs(run *store.Run, plan *workflow.Plan) []*store.Job {
	var jobs []*store.Job
	for i, p := range plan.Jobs {
		jobs = append(jobs, &store.Job{
			ID: newID(), RunID: run.ID, Idx: i, Key: p.ID, Name: p.Name, Label: firstOf(p.RunsOn, DefaultLabel), State: store.JobWaiting,
			Needs: encode(p.Needs), Spec: encode(p), Priority: run.Priority, RepoKey: run.RepoKey,
		})
	}
	return jobs
}

func queuedLabels(jobs []*store.Job) []string {
	var out []string
	for _, j := range jobs {
		if j.State == store.JobQueued && !slices.Contains(out, j.Label) {
			out = append(out, j.Label)
		}
	}
	return out
}

// newID is a random identifier that sorts by time: UUID version 7 (RFC 9562).
func newID() string { return uuid.Must(uuid.NewV7()).String() }

func traceParent(ctx context.Context) string {
	c := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, c)
	return c["traceparent"]
}

func withTraceParent(ctx context.Context, parent string) context.Context {
	return propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier{"traceparent": parent})
}
