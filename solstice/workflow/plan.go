package workflow

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Plan expands the workflow into the jobs to schedule for one event. With errors
// among the diagnostics the plan is nil; a workflow that Parse reported errors
// about is refused.
func (w *Workflow) Plan(o PlanOptions) (*Plan, Diagnostics) {
	r := &reporter{src: w.source}
	if r.src == nil {
		r.src = newSource(w.Path, "")
	}
	if w.broken || len(w.Jobs) == 0 {
		r.at(Position{1, 1}, 1, "the workflow has errors and cannot be planned")
		return nil, r.result()
	}
	p := &Plan{Name: w.Name, Path: w.Path, Inputs: w.planInputs(r, o)}
	selected := w.selectJobs(r, o.Jobs)
	if len(r.diags) > 0 {
		return nil, r.result()
	}
	c := Contexts{Event: o.Contexts.Event, Ref: o.Contexts.Ref, SHA: o.Contexts.SHA, Repo: o.Contexts.Repo, Inputs: p.Inputs}
	if w.Concurrency != nil {
		group, err := c.Interpolate(w.Concurrency.Group)
		switch {
		case err != nil:
			r.at(w.groupAt, 1, "the group of concurrency: %s", strings.TrimPrefix(err.Error(), ErrInvalid.Error()+": "))
		case strings.TrimSpace(group) == "":
			r.at(w.groupAt, 1, "the group of concurrency comes to nothing")
		}
		p.Concurrency = &Concurrency{Group: strings.TrimSpace(group), CancelInProgress: w.Concurrency.CancelInProgress}
	}
	names := map[string]bool{}
	for i := range w.Jobs {
		j := &w.Jobs[i]
		if !selected[j.ID] {
			continue
		}
		combos := []Values{nil}
		if j.Matrix != nil {
			combos = j.Matrix.Combinations()
		}
		if len(p.Jobs)+len(combos) > MaxJobs {
			r.at(j.Position, len(j.ID), "the plan has more than %d jobs", MaxJobs)
			return nil, r.result()
		}
		for _, m := range combos {
			c.Matrix = m
			p.Jobs = append(p.Jobs, w.planJob(r, j, c, names))
		}
	}
	if d := r.result(); d.HasErrors() {
		return nil, d
	}
	return p, r.result()
}

func (w *Workflow) planJob(r *reporter, j *Job, c Contexts, names map[string]bool) PlannedJob {
	failed := false
	resolve := func(key, s string) string {
		v, err := c.Interpolate(s)
		if err != nil {
			failed = true
			r.at(j.at[key], 1, "%s of job %q: %s", key, j.ID, strings.TrimPrefix(err.Error(), ErrInvalid.Error()+": "))
		}
		return strings.TrimSpace(v)
	}
	pj := PlannedJob{
		ID: j.ID, Matrix: c.Matrix, Needs: slices.Clone(j.Needs), If: j.If, Timeout: j.Timeout,
		Env: slices.Concat(w.Env, j.Env), Checkout: w.Checkout, Setup: j.Setup, Outputs: slices.Clone(j.Outputs), Position: j.Position,
	}
	if len(pj.Env) == 0 {
		pj.Env = nil
	}
	pj.RunsOn = resolve("runs-on", firstNonEmpty(j.RunsOn, w.Defaults.RunsOn))
	if j.RunsOn != "" && pj.RunsOn == "" && !failed {
		r.at(j.at["runs-on"], 1, "runs-on of job %q comes to nothing", j.ID)
	}
	for _, t := range []time.Duration{w.Defaults.Timeout, DefaultTimeout} {
		if pj.Timeout == 0 {
			pj.Timeout = t
		}
	}
	if j.Checkout != nil {
		pj.Checkout = *j.Checkout
	}
	for _, s := range j.Steps {
		s.Name, s.Env = c.resolveEarly(s.Name), slices.Clone(s.Env)
		s.Shell = firstNonEmpty(s.Shell, w.Defaults.Shell)
		s.Workdir = firstNonEmpty(s.Workdir, w.Defaults.Workdir)
		pj.Steps = append(pj.Steps, s)
	}
	pj.Name = w.jobName(j, c.Matrix, resolve("name", firstNonEmpty(j.Name, j.ID)), names)
	return pj
}

// resolveEarly interpolates a text in which everything is known at planning,
// and returns any other as written.
func (c Contexts) resolveEarly(s string) string {
	parts, terr := split(s)
	if terr != nil {
		return s
	}
	for _, part := range parts {
		if !part.isExpr {
			continue
		}
		if p, err := programs.get(part.text); err != nil || p.late || p.status {
			return s
		}
	}
	v, err := c.Interpolate(s)
	if err != nil || strings.Contains(v, "${{") { // or it would be evaluated again
		return s
	}
	return v
}

// jobName tells combinations apart unless the declared name does so itself.
func (w *Workflow) jobName(j *Job, m Values, name string, names map[string]bool) string {
	if name == "" {
		name = j.ID
	}
	if j.Matrix != nil && (!strings.Contains(j.Name, "${{") || names[name]) {
		if label := j.Matrix.label(m); label != "" {
			name = fmt.Sprintf("%s (%s)", name, label)
		}
	}
	unique := name
	for i := 2; names[unique]; i++ {
		unique = fmt.Sprintf("%s #%d", name, i)
	}
	names[unique] = true
	return unique
}

func firstNonEmpty(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// planInputs types what a person gave and fills in defaults.
func (w *Workflow) planInputs(r *reporter, o PlanOptions) Values {
	var declared []Input
	if w.On.Manual != nil {
		declared = w.On.Manual.Inputs
	}
	manual := o.Trigger == Manual || len(o.Inputs) > 0
	out := Values{}
	var names []string
	for _, in := range declared {
		names = append(names, in.Name)
		given, ok := o.Inputs[in.Name]
		switch {
		case ok:
			v, err := in.parse(given)
			if err != nil {
				r.at(w.inputAt[in.Name], len(in.Name), "input %s: %v", in.Name, err).Allowed = in.Options
				continue
			}
			out[in.Name] = v
		case in.Default != nil:
			out[in.Name] = in.Default
		case in.Required && manual:
			d := r.at(w.inputAt[in.Name], len(in.Name), "input %s is required", in.Name)
			d.Allowed, d.Hint = in.Options, in.Description
		default:
			out[in.Name] = in.zero()
		}
	}
	given := make([]string, 0, len(o.Inputs))
	for name := range o.Inputs {
		given = append(given, name)
	}
	slices.Sort(given)
	for _, name := range given {
		if !slices.Contains(names, name) {
			r.at(Position{1, 1}, 1, "the workflow has no input %q", name).suggest(name, names)
		}
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

func (in Input) zero() any {
	switch {
	case in.Type == InputBool:
		return false
	case in.Type == InputNumber:
		return json.Number("0")
	case in.Type == InputChoice && len(in.Options) > 0:
		return in.Options[0]
	}
	return ""
}

// selectJobs is the set of IDs and what they need.
func (w *Workflow) selectJobs(r *reporter, ids []string) map[string]bool {
	byID := map[string]*Job{}
	var all []string
	for i := range w.Jobs {
		byID[w.Jobs[i].ID] = &w.Jobs[i]
		all = append(all, w.Jobs[i].ID)
	}
	if len(ids) == 0 {
		ids = all
	}
	out := map[string]bool{}
	var add func(id string)
	add = func(id string) {
		if out[id] {
			return
		}
		out[id] = true
		for _, n := range byID[id].Needs {
			add(n)
		}
	}
	for _, id := range ids {
		if byID[id] == nil {
			r.at(Position{1, 1}, 1, "the workflow has no job %q", id).suggest(id, all)
			continue
		}
		add(id)
	}
	return out
}
