package solstice

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

func repoName(raw json.RawMessage) string { return decode[forge.Repo](raw).FullName() }

// jobSpec is what the agent gets: the plan's job, with what is known of the run
// as data. Expressions stay as written; the agent evaluates them.
func (e *Engine) jobSpec(ctx context.Context, run *store.Run, job *store.Job, a *store.Attempt) (*agentv1.JobSpec, error) {
	spec := decode[workflow.PlannedJob](job.Spec)
	needs := map[string]workflow.Need{}
	if len(spec.Needs) > 0 {
		jobs, err := e.store.Jobs(ctx, run.ID)
		if err != nil {
			return nil, err
		}
		byKey := map[string][]*store.Job{}
		for _, j := range jobs {
			byKey[j.Key] = append(byKey[j.Key], j)
		}
		needs, _ = needsOf(job, byKey)
	}
	cx, err := json.Marshal(contextsOf(run, &spec, needs))
	if err != nil {
		return nil, fmt.Errorf("solstice: contexts of job %s: %w", job.ID, err)
	}
	repo := decode[forge.Repo](run.Repo)
	out := &agentv1.JobSpec{
		RunId: run.ID, JobId: job.ID, Name: job.Name, Workflow: run.WorkflowName, Contexts: cx,
		Source: &agentv1.Source{
			Path: "/git/" + a.ID, Commit: run.Commit, Ref: run.Ref, RepoUrl: firstOf(repo.URL, repo.CloneURL),
		},
		Env: envVars(spec.Env),
		Limits: &agentv1.Limits{
			JobTimeout: durationpb.New(spec.Timeout), CancelGrace: durationpb.New(e.cfg.CancelGrace), LogBytes: e.cfg.LogBytes,
		},
	}
	out.Steps = stepsOf(&spec)
	if !spec.Checkout.Disabled {
		out.Checkout = &agentv1.Checkout{Depth: int32(spec.Checkout.Depth), Submodules: spec.Checkout.Submodules, Lfs: spec.Checkout.LFS}
	}
	for _, o := range spec.Outputs {
		out.Outputs = append(out.Outputs, &agentv1.Output{Name: o.Name, Value: o.Value})
	}
	return out, nil
}

// stepsOf lists what the agent does for a job, in order: the checkout and the
// set-up script are steps like the others.
func stepsOf(spec *workflow.PlannedJob) []*agentv1.Step {
	var out []*agentv1.Step
	if !spec.Checkout.Disabled {
		out = append(out, &agentv1.Step{Name: "checkout", Kind: agentv1.StepKind_STEP_KIND_CHECKOUT})
	}
	if spec.Setup != "" {
		out = append(out, &agentv1.Step{Name: "setup: " + spec.Setup, Kind: agentv1.StepKind_STEP_KIND_SETUP, Run: spec.Setup})
	}
	for _, s := range spec.Steps {
		out = append(out, &agentv1.Step{
			Id: s.ID, Name: s.Name, Kind: agentv1.StepKind_STEP_KIND_RUN, Run: s.Run, Shell: s.Shell, Workdir: s.Workdir,
			Env: envVars(s.Env), Condition: s.If, Timeout: durationpb.New(s.Timeout), ContinueOnError: s.ContinueOnError,
		})
	}
	return out
}

func envVars(kvs []workflow.KV) []*agentv1.EnvVar {
	out := make([]*agentv1.EnvVar, 0, len(kvs))
	for _, kv := range kvs {
		out = append(out, &agentv1.EnvVar{Name: kv.Name, Value: kv.Value})
	}
	return out
}

func firstOf(ss ...string) string {
	for _, s := range ss {
		if s != "" {
			return s
		}
	}
	return ""
}

// stepName is a step's name on one line, at most 120 characters.
func stepName(spec []*agentv1.Step, i int) string {
	if i < 0 || i >= len(spec) {
		return fmt.Sprintf("step %d", i+1)
	}
	name, _, _ := strings.Cut(strings.TrimSpace(spec[i].GetName()), "\n")
	if r := []rune(name); len(r) > 120 {
		name = string(r[:119]) + "…"
	}
	return name
}
