package workflow

import (
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"
)

// Parse reads a workflow file; path is what diagnostics call it and, lacking a
// name key, what the workflow is called after. Everything wrong with the file is
// reported at once, in order of position.
//
// The Workflow is never nil. When there are errors it holds what could be read,
// which Match can work with, and Plan refuses it.
func Parse(path string, src []byte) (*Workflow, Diagnostics) {
	w := &Workflow{Path: path, Name: baseName(path), On: defaultTriggers(), Checkout: Checkout{Depth: 1}}
	r, text, ok := checkText(path, src)
	w.source = r.src
	if ok {
		if root := load(r, text); root != nil {
			r.check(root, rootShape, "the workflow")
			p := &fileParser{reporter: r, w: w}
			p.workflow(root)
			p.checkJobs()
			p.checkExpressions()
		}
	}
	diags := r.result()
	w.broken = diags.HasErrors()
	return w, diags
}

func baseName(p string) string {
	b := path.Base(p)
	return strings.TrimSuffix(b, path.Ext(b))
}

func defaultTriggers() Triggers {
	return Triggers{Push: &Filter{}, PullRequest: &Filter{}, Manual: &ManualTrigger{}}
}

// fileParser turns nodes into a Workflow. The nodes were checked against the
// table before, so that it passes over what does not fit, and reports only what
// the table cannot say.
type fileParser struct {
	*reporter
	w     *Workflow
	jobs  []*jobInfo // parallel to w.Jobs
	byID  map[string]*jobInfo
	sites []*site // texts with expressions
}

// jobInfo is what checks need to know beyond the Job.
type jobInfo struct {
	job     *Job
	node    *yaml.Node
	needs   []*yaml.Node // parallel to job.Needs
	stepIDs []string     // parallel to job.Steps, "" where a step has none
}

func (p *fileParser) workflow(n *yaml.Node) {
	w := p.w
	if name := get(n, "name"); isScalar(name) && strings.TrimSpace(name.Value) != "" {
		w.Name = strings.TrimSpace(name.Value)
		p.refuseExpressions(name, "the workflow's name")
	}
	if on := get(n, "on"); on != nil {
		w.On = p.triggers(on)
	}
	w.Env = p.env(get(n, "env"), &site{place: placeWorkflowEnv, step: -1})
	if d := get(n, "defaults"); d != nil {
		w.Defaults = Defaults{
			RunsOn: text(get(d, "runs-on")), Shell: text(get(d, "shell")),
			Workdir: text(get(d, "workdir")), Timeout: duration(get(d, "timeout")),
		}
		p.refuseExpressions(get(d, "shell"), "defaults.shell")
		p.checkShell(get(d, "shell"))
		p.refuseExpressions(get(d, "runs-on"), "defaults.runs-on")
		p.refuseExpressions(get(d, "workdir"), "defaults.workdir")
		p.checkInside(get(d, "workdir"), "defaults.workdir")
	}
	if c := get(n, "checkout"); c != nil {
		w.Checkout = checkout(c)
	}
	w.Concurrency = p.concurrency(get(n, "concurrency"))
	p.byID = map[string]*jobInfo{}
	for k, v := range entries(get(n, "jobs")) {
		info := &jobInfo{job: &Job{ID: k.Value, Position: nodePos(k)}, node: v}
		p.jobs = append(p.jobs, info)
		p.byID[k.Value] = info
	}
	for _, info := range p.jobs {
		p.job(info)
		w.Jobs = append(w.Jobs, *info.job)
	}
}

func (p *fileParser) concurrency(n *yaml.Node) *Concurrency {
	group := n
	if g := get(n, "group"); g != nil {
		group = g
	}
	if !isScalar(group) {
		return nil
	}
	p.w.groupAt = nodePos(group)
	p.template(group, &site{place: placeConcurrency, step: -1})
	return &Concurrency{Group: strings.TrimSpace(group.Value), CancelInProgress: text(get(n, "cancel-in-progress")) == "true"}
}

func (p *fileParser) triggers(n *yaml.Node) Triggers {
	var t Triggers
	add := func(name string, v *yaml.Node) {
		switch TriggerKind(name) {
		case Push:
			t.Push = &Filter{Branches: p.patterns(v, "branches"), Paths: p.patterns(v, "paths")}
		case PullRequest:
			t.PullRequest = &Filter{Branches: p.patterns(v, "branches"), Paths: p.patterns(v, "paths")}
		case Tag:
			t.Tag = &Filter{Tags: p.patterns(v, "tags")}
		case Manual:
			t.Manual = &ManualTrigger{Inputs: p.inputs(get(v, "inputs"))}
		}
	}
	add(text(n), nil)
	for _, v := range items(n) {
		add(text(v), nil)
	}
	for k, v := range entries(n) {
		add(k.Value, v)
	}
	return t
}

// patterns reads a filter: one pattern or a list of them.
func (p *fileParser) patterns(n *yaml.Node, key string) []string {
	var out []string
	add := func(v *yaml.Node) {
		if !isScalar(v) {
			return
		}
		if msg := validPattern(v.Value); msg != "" {
			p.at(nodePos(v), nodeWidth(v), "pattern %q %s", v.Value, msg)
		}
		p.refuseExpressions(v, "a filter")
		out = append(out, v.Value)
	}
	n = get(n, key)
	add(n)
	for _, v := range items(n) {
		add(v)
	}
	return out
}

func (p *fileParser) inputs(n *yaml.Node) []Input {
	var out []Input
	p.w.inputAt = map[string]Position{}
	for k, v := range entries(n) {
		in := Input{Name: k.Value, Type: InputType(text(get(v, "type"))), Description: text(get(v, "description"))}
		if in.Type == "" {
			in.Type = InputString
		}
		in.Required = text(get(v, "required")) == "true"
		options := get(v, "options")
		for _, o := range items(options) {
			in.Options = append(in.Options, text(o))
		}
		switch {
		case in.Type == InputChoice && options == nil:
			p.at(nodePos(k), nodeWidth(k), "input %q is a choice without options", in.Name).hint("add options: [a, b]")
		case in.Type != InputChoice && options != nil:
			p.at(nodePos(options), nodeWidth(options), "input %q has options but is a %s", in.Name, in.Type).hint("write type: choice")
		}
		if d := get(v, "default"); isScalar(d) {
			p.refuseExpressions(d, "a default")
			val, err := in.parse(d.Value)
			if err != nil && !(in.Type == InputChoice && options == nil) {
				p.at(nodePos(d), nodeWidth(d), "default of input %q: %v", in.Name, err).Allowed = in.Options
			}
			in.Default = val
		}
		p.w.inputAt[in.Name] = nodePos(k)
		out = append(out, in)
	}
	return out
}

func (p *fileParser) job(info *jobInfo) {
	j, n := info.job, info.node
	j.at = map[string]Position{}
	remember := func(key string) *yaml.Node {
		v := get(n, key)
		if v != nil {
			j.at[key] = nodePos(v)
		}
		return v
	}
	here := func(pl place) *site { return &site{place: pl, job: info, step: -1} }
	j.Name = strings.TrimSpace(text(remember("name")))
	p.template(get(n, "name"), here(placeJobName))
	j.RunsOn = strings.TrimSpace(text(remember("runs-on")))
	p.template(get(n, "runs-on"), here(placeRunsOn))
	add := func(v *yaml.Node) {
		if isScalar(v) {
			j.Needs = append(j.Needs, v.Value)
			info.needs = append(info.needs, v)
		}
	}
	needs := get(n, "needs")
	add(needs)
	for _, v := range items(needs) {
		add(v)
	}
	j.If = p.condition(get(n, "if"), here(placeJobIf))
	j.Matrix = p.matrix(remember("matrix"))
	j.Env = p.env(get(n, "env"), here(placeJobEnv))
	j.Timeout = duration(get(n, "timeout"))
	if c := get(n, "checkout"); c != nil {
		co := checkout(c)
		j.Checkout = &co
	}
	j.Setup = text(get(n, "setup"))
	p.template(get(n, "setup"), here(placeSetup))
	p.checkInside(get(n, "setup"), "setup")
	for i, s := range items(get(n, "steps")) {
		p.step(info, i, s)
	}
	for k, v := range entries(get(n, "outputs")) {
		j.Outputs = append(j.Outputs, KV{k.Value, text(v)})
		p.template(v, &site{place: placeOutputs, job: info, step: len(j.Steps)})
	}
}

func (p *fileParser) step(info *jobInfo, i int, n *yaml.Node) {
	here := func(pl place) *site { return &site{place: pl, job: info, step: i, shell: text(get(n, "shell"))} }
	s := Step{
		ID: text(get(n, "id")), Run: text(get(n, "run")), Position: nodePos(n),
		Shell: text(get(n, "shell")), Workdir: text(get(n, "workdir")),
		Timeout: duration(get(n, "timeout")), ContinueOnError: text(get(n, "continue-on-error")) == "true",
	}
	s.Name = strings.TrimSpace(text(get(n, "name")))
	if s.Name == "" {
		s.Name = firstLine(s.Run)
	}
	if run := get(n, "run"); isScalar(run) && strings.TrimSpace(s.Run) == "" {
		p.at(nodePos(run), nodeWidth(run), "run is empty")
	}
	p.template(get(n, "name"), here(placeStep))
	s.Env = p.env(get(n, "env"), here(placeStepEnv))
	p.template(get(n, "run"), here(placeRun))
	p.template(get(n, "shell"), here(placeShell))
	p.template(get(n, "workdir"), here(placeStep))
	p.checkInside(get(n, "workdir"), "workdir")
	s.If = p.condition(get(n, "if"), here(placeStepIf))
	p.checkShell(get(n, "shell"))
	info.job.Steps = append(info.job.Steps, s)
	if id := get(n, "id"); isScalar(id) {
		for k, other := range info.stepIDs {
			if other == s.ID {
				p.at(nodePos(id), nodeWidth(id), "step id %q is a duplicate", s.ID).
					hint("step %d of the job on line %d has it already", k+1, info.job.Steps[k].Position.Line)
				break
			}
		}
	}
	info.stepIDs = append(info.stepIDs, s.ID)
}

// checkInside refuses a path that is known to leave the work tree.
func (p *fileParser) checkInside(n *yaml.Node, what string) {
	s := text(n)
	if s == "" || strings.Contains(s, "${{") {
		return
	}
	if c := path.Clean(s); path.IsAbs(c) || c == ".." || strings.HasPrefix(c, "../") {
		p.at(nodePos(n), nodeWidth(n), "%s %q is not inside the work tree", what, s).hint("write a path that begins at the top of the repository")
	}
}

// shells that are known by name; any other shell is a command line.
var shells = []string{"sh", "bash", "python", "pwsh"}

// checkShell refuses what is neither a known name nor has a place for the
// script.
func (p *fileParser) checkShell(n *yaml.Node) {
	s := text(n)
	if n == nil || strings.Contains(s, "{0}") || strings.Contains(s, "${{") {
		return
	}
	for _, k := range shells {
		if s == k {
			return
		}
	}
	if s == "" {
		p.at(nodePos(n), nodeWidth(n), "shell is empty").Allowed = shells
		return
	}
	d := p.at(nodePos(n), nodeWidth(n), "unknown shell %q", s).suggest(s, shells)
	if d.Hint == "" || strings.ContainsAny(s, " /") {
		d.hint("any other shell is written as a command line with {0} for the script, such as %q", s+" {0}")
	}
}

// env reads a mapping of variables; in says where it stands.
func (p *fileParser) env(n *yaml.Node, in *site) []KV {
	var out []KV
	for k, v := range entries(n) {
		out = append(out, KV{k.Value, text(v)})
		s := *in
		s.env = k.Value
		p.template(v, &s)
	}
	return out
}

// template notes a text in which ${{ }} is evaluated, for checkExpressions.
func (p *fileParser) template(n *yaml.Node, s *site) {
	if isScalar(n) {
		s.node = n
		p.sites = append(p.sites, s)
	}
}

// condition notes the value of an if and returns it.
func (p *fileParser) condition(n *yaml.Node, s *site) string {
	if !isScalar(n) {
		return ""
	}
	s.isCondition = true
	p.template(n, s)
	return strings.TrimSpace(n.Value)
}

// refuseExpressions reports ${{ }} where it is not evaluated.
func (p *fileParser) refuseExpressions(n *yaml.Node, what string) {
	if isScalar(n) && strings.Contains(n.Value, "${{") {
		p.at(nodePos(n), nodeWidth(n), "expressions are not evaluated in %s", what)
	}
}

func checkout(n *yaml.Node) Checkout {
	c := Checkout{Depth: 1}
	if isScalar(n) {
		c.Disabled = n.Value == "false"
		return c
	}
	if d := get(n, "depth"); d != nil {
		c.Depth, _ = strconv.Atoi(text(d))
	}
	c.Submodules = text(get(n, "submodules")) == "true"
	c.LFS = text(get(n, "lfs")) == "true"
	return c
}

func duration(n *yaml.Node) time.Duration {
	if !isScalar(n) {
		return 0
	}
	d, err := parseDuration(n)
	if err != nil {
		return 0
	}
	return d
}

// firstLine is a name for a script: its first line that is not blank, cut where
// it is long or an expression goes on in the next line.
func firstLine(script string) string {
	for l := range strings.Lines(script) {
		if l = strings.TrimSpace(l); l == "" {
			continue
		}
		l = abbreviate(l)
		if _, err := split(l); err != nil {
			l = string([]rune(l)[:err.start]) + "…"
		}
		return l
	}
	return ""
}

// checkJobs reports what is wrong between jobs: needs and cycles, and names.
func (p *fileParser) checkJobs() {
	var ids []string
	for _, info := range p.jobs {
		ids = append(ids, info.job.ID)
	}
	names := map[string]string{}
	for _, info := range p.jobs {
		seen := map[string]bool{}
		for i, id := range info.job.Needs {
			n := info.needs[i]
			switch {
			case id == info.job.ID:
				p.at(nodePos(n), nodeWidth(n), "job %q needs itself", id)
			case p.byID[id] == nil:
				p.at(nodePos(n), nodeWidth(n), "there is no job %q", id).suggest(id, ids)
			case seen[id]:
				p.at(nodePos(n), nodeWidth(n), "job %q is listed twice", id)
			}
			seen[id] = true
		}
		name := info.job.Name
		if name == "" {
			name = info.job.ID
		}
		if strings.Contains(name, "${{") {
			continue
		}
		if other, ok := names[name]; ok {
			at := info.job.Position
			if info.job.Name != "" {
				at = info.job.at["name"]
			}
			p.at(at, len(name), "job %q is called the same as job %q: %s", info.job.ID, other, name)
		}
		names[name] = info.job.ID
	}
	p.checkCycles()
}

// checkCycles reports each cycle in needs once, at the job declared first in it.
func (p *fileParser) checkCycles() {
	const (
		open = 1
		done = 2
	)
	state := map[string]int{}
	var stack []*jobInfo
	var visit func(info *jobInfo)
	visit = func(info *jobInfo) {
		state[info.job.ID] = open
		stack = append(stack, info)
		for i, id := range info.job.Needs {
			next := p.byID[id]
			if next == nil || next == info {
				continue
			}
			switch state[id] {
			case 0:
				visit(next)
			case open:
				var names []string
				for k := len(stack) - 1; k >= 0; k-- {
					names = append([]string{stack[k].job.ID}, names...)
					if stack[k] == next {
						break
					}
				}
				n := info.needs[i]
				p.at(nodePos(n), nodeWidth(n), "jobs need each other in a circle: %s", strings.Join(append(names, id), " → "))
			}
		}
		stack = stack[:len(stack)-1]
		state[info.job.ID] = done
	}
	for _, info := range p.jobs {
		if state[info.job.ID] == 0 {
			visit(info)
		}
	}
}

// InputType is the type of an input of a manual start.
type InputType string

// Types of inputs.
const (
	InputString InputType = "string"
	InputBool   InputType = "bool"
	InputNumber InputType = "number"
	InputChoice InputType = "choice"
)

// Input is what a person may give when starting a workflow.
type Input struct {
	Name        string
	Type        InputType
	Description string
	Default     any // string, bool or json.Number; nil: none
	Required    bool
	Options     []string // of a choice
}

// parse types a value as a person wrote it.
func (in Input) parse(s string) (any, error) {
	switch in.Type {
	case InputBool:
		if s == "true" || s == "false" {
			return s == "true", nil
		}
		return nil, fmt.Errorf("must be true or false, not %q", s)
	case InputNumber:
		if n, ok := number(s); ok {
			return n, nil
		}
		return nil, fmt.Errorf("must be a number, not %q", s)
	case InputChoice:
		for _, o := range in.Options {
			if s == o {
				return s, nil
			}
		}
		return nil, fmt.Errorf("cannot be %q", s)
	}
	if len(s) > MaxScalar {
		return nil, fmt.Errorf("has %d bytes, at most %d are allowed", len(s), MaxScalar)
	}
	return s, nil
}
