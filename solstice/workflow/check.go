package workflow

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"cel.dev/cel-go/cel"
	"go.yaml.in/yaml/v4"
)

// place is where in a workflow an expression stands, which decides what it can
// see.
type place int

const (
	placeWorkflowEnv place = iota
	placeConcurrency
	placeJobName
	placeRunsOn
	placeJobIf
	placeJobEnv
	placeSetup
	placeStep // name, workdir
	placeStepIf
	placeStepEnv
	placeRun
	placeShell
	placeOutputs
)

// placeRules is what the places differ in.
var placeRules = [...]struct {
	what     string
	contexts string // that may be named
	script   bool   // what is interpolated is executed
}{
	placeWorkflowEnv: {"the workflow's env", "event inputs ref sha repo env", false},
	placeConcurrency: {"concurrency", "event inputs ref sha repo", false},
	placeJobName:     {"a job's name", "event inputs matrix ref sha repo", false},
	placeRunsOn:      {"runs-on", "event inputs matrix ref sha repo", false},
	placeJobIf:       {"a job's if", "event inputs matrix needs ref sha repo", false},
	placeJobEnv:      {"a job's env", "event inputs matrix needs ref sha repo env", false},
	placeSetup:       {"setup", "event inputs matrix needs ref sha repo env", true},
	placeStep:        {"a step", "event inputs matrix needs steps ref sha repo env", false},
	placeStepIf:      {"a step's if", "event inputs matrix needs steps ref sha repo env", false},
	placeStepEnv:     {"a step's env", "event inputs matrix needs steps ref sha repo env", false},
	placeRun:         {"run", "event inputs matrix needs steps ref sha repo env", true},
	placeShell:       {"shell", "event inputs matrix needs steps ref sha repo env", true},
	placeOutputs:     {"outputs", "event inputs matrix needs steps ref sha repo env", false},
}

func (p place) contexts() []string { return strings.Fields(placeRules[p].contexts) }

// site is a text with expressions.
type site struct {
	place       place
	node        *yaml.Node
	isCondition bool
	job         *jobInfo // nil at the top of the file
	step        int      // index; number of steps: after the last; -1: none
	env         string   // name, of an entry of env
	shell       string   // of the step
	positions   []Position
}

// pos is where the i-th character of the site's text is in the file.
func (p *fileParser) pos(s *site, i int) Position {
	if s.positions == nil {
		s.positions = p.src.locate(s.node)
	}
	return s.positions[min(max(i, 0), len(s.positions)-1)]
}

// scope is what the expressions of one job can see.
type scope struct {
	env     *cel.Env        // typed
	taint   map[string]bool // env variables whose value comes from outside; absent: not set in the file
	stepEnv map[string]bool // the same, of one step's env
	stepAt  int             // that step's index
}

func (p *fileParser) checkExpressions() {
	top := &scope{taint: map[string]bool{}}
	scopes := map[*jobInfo]*scope{nil: top}
	for _, s := range p.sites {
		sc := scopes[s.job]
		if sc == nil {
			sc = &scope{taint: map[string]bool{}}
			for k, v := range top.taint {
				sc.taint[k] = v
			}
			scopes[s.job] = sc
		}
		p.checkSite(s, sc)
	}
}

func (p *fileParser) checkSite(s *site, sc *scope) {
	if s.step != sc.stepAt || sc.stepEnv == nil {
		sc.stepEnv, sc.stepAt = map[string]bool{}, s.step
	}
	tainted := false
	defer func() {
		switch s.place {
		case placeWorkflowEnv, placeJobEnv:
			sc.taint[s.env] = tainted
		case placeStepEnv:
			sc.stepEnv[s.env] = tainted
		}
	}()
	value := s.node.Value
	if !strings.Contains(value, "${{") && !s.isCondition {
		return
	}
	parts, terr := split(value)
	if s.isCondition {
		lead := utf8.RuneCountInString(value[:len(value)-len(strings.TrimLeft(value, " \t\r\n"))])
		bare, err := bareCondition(value)
		switch {
		case strings.TrimSpace(value) == "":
			p.at(nodePos(s.node), nodeWidth(s.node), "if is empty")
			return
		case terr != nil && err != nil:
		case err != nil:
			p.at(nodePos(s.node), nodeWidth(s.node), "an if is one expression, here ${{ }} is mixed with other text").
				hint("write the whole condition without ${{ }}")
			return
		case strings.HasPrefix(strings.TrimSpace(value), "${{"):
			terr = nil
		default:
			parts, terr = []part{{text: bare, isExpr: true, start: lead}}, nil
		}
	}
	if terr != nil {
		p.at(p.pos(s, terr.start), 3, "%s", terr.msg)
	}
	for _, part := range parts {
		if part.isExpr {
			tainted = p.checkExpr(part, s, sc) || tainted
		}
	}
}

// Advice for people who come from GitHub Actions.
var (
	foreignContexts = map[string]string{
		"github": "what happened is in event, ref, sha and repo", "secrets": "there are no secrets yet",
		"strategy": "the values of the matrix are in matrix", "vars": "values for all jobs are in the workflow's env",
		"runner": "the machine is the step's own: ask it in a script", "job": "use success(), failure() or cancelled()",
		"branch": "the branch is in ref: refs/heads/main", "inputs": "",
	}
	foreignFuncs = map[string]string{
		"format": "put ${{ }} into text, or add texts with +", "tojson": "lists and maps become JSON by themselves",
		"fromjson": "", "hashfiles": "an expression cannot read files", "join": "write list.join(', ')",
	}
	methods = []string{"contains", "startsWith", "endsWith", "matches", "size", "join", "split", "replace", "lowerAscii", "upperAscii", "trim", "substring", "indexOf"}
)

// checkExpr checks one expression and reports whether its value comes from
// outside: from the event, a person, or the output of a program.
func (p *fileParser) checkExpr(part part, s *site, sc *scope) (tainted bool) {
	report := func(sp span, format string, args ...any) *Diagnostic {
		from, to := p.pos(s, part.start+sp.from), p.pos(s, part.start+max(sp.to, sp.from+1)-1)
		width := 1
		if to.Line == from.Line && to.Column > from.Column {
			width = to.Column - from.Column + 1
		}
		return p.at(from, width, format, args...)
	}
	runes := []rune(part.text)
	ast, iss := celEnv().Parse(part.text)
	if iss.Err() != nil {
		e := iss.Errors()[0]
		off := offsetOf(runes, e.Location.Line(), e.Location.Column())
		d := report(span{off, off + 1}, "%s", celMessage(e.Message))
		switch {
		case off < len(runes) && runes[off] == '=':
			d.hint("compare with ==")
		case off < len(runes) && runes[off] == '$':
			d.hint("inside an expression there is no ${{")
		}
		return false
	}
	c := &refChecker{p: p, s: s, sc: sc, runes: runes, report: report}
	c.info = ast.NativeRep().SourceInfo()
	c.walk(ast.NativeRep().Expr(), nil)
	if placeRules[s.place].script && len(c.tainted) > 0 {
		p.reportInjection(c, s, part)
	}
	checked, iss := p.typedEnv(s.job, sc).Check(ast)
	for _, e := range iss.Errors() {
		at := callName(runes, offsetOf(runes, e.Location.Line(), e.Location.Column()))
		// Where a reference is wrong its type is, too: that was said. A function
		// that does not exist was not.
		if c.failed && (!strings.HasPrefix(e.Message, "undeclared reference") || at.to >= len(runes) || runes[at.to] != '(') {
			continue
		}
		adviseFunction(report(at, "%s", celMessage(e.Message)), e.Message)
	}
	if c.failed || iss.Err() != nil || !s.isCondition {
		return len(c.tainted) > 0
	}
	if t := checked.OutputType(); !t.IsExactType(cel.BoolType) && !t.IsExactType(cel.DynType) {
		report(span{0, len(runes)}, "a condition must be true or false, this is of type %s", t).
			hint("compare it with something, such as == 'x'")
	}
	return len(c.tainted) > 0
}

var (
	quotedFunc = pattern(`(?:reference to|overload for|function) '([A-Za-z_]+)'`)
	celNoMatch = pattern(`^found no matching overload for '([^']+)' applied to '(.*)'$`)
	celOps     = map[string]string{
		"_+_": "+", "_-_": "-", "_*_": "*", "_/_": "/", "_%_": "%", "_==_": "==", "_!=_": "!=", "_<_": "<", "_<=_": "<=", "_>_": ">", "_>=_": ">=",
		"_&&_": "&&", "_||_": "||", "!_": "!", "-_": "-", "_[_]": "[]", "@in": "in", "_?_:_": "?:",
	}
	celUnexpected = pattern(`(?:extraneous input|mismatched input|no viable alternative at input|token recognition error at:) ?'(.*?)'(?: expecting.*)?$`)
)

// celMessage puts an error of the CEL library into words for someone who does
// not know its grammar.
func celMessage(msg string) string {
	msg = strings.TrimPrefix(msg, "Syntax error: ")
	msg = strings.TrimSuffix(msg, " (in container '')")
	if m := celNoMatch().FindStringSubmatch(msg); m != nil {
		if op, ok := celOps[m[1]]; ok {
			return fmt.Sprintf("%s does not work with %s", op, m[2])
		}
		return fmt.Sprintf("%s does not work with %s", m[1], m[2])
	}
	if strings.Contains(msg, "'<EOF>'") && !strings.HasPrefix(msg, "extraneous") {
		return "the expression is incomplete"
	}
	if m := celUnexpected().FindStringSubmatch(msg); m != nil {
		return fmt.Sprintf("unexpected %q in the expression", strings.TrimSpace(m[1]))
	}
	if name, ok := strings.CutPrefix(msg, "undeclared reference to "); ok {
		return "there is no " + name
	}
	if name, ok := strings.CutPrefix(msg, "no such key: "); ok {
		return fmt.Sprintf("there is no %q; ask has() first where it may be absent", name)
	}
	return msg
}

func adviseFunction(d *Diagnostic, msg string) {
	m := quotedFunc().FindStringSubmatch(msg)
	if m == nil {
		return
	}
	name := m[1]
	if advice, ok := foreignFuncs[strings.ToLower(name)]; ok && advice != "" {
		d.hint("%s", advice)
		return
	}
	if slices.Contains(methods, name) {
		d.hint("it is called on a value: ref.%s(…)", name)
		return
	}
	if near := nearest(name, slices.Concat(methods, statusFuncs, []string{"has"})); near != "" {
		d.hint("did you mean %s()?", near)
	}
}

// offsetOf turns CEL's line (from 1) and column (from 0) into a character
// offset.
func offsetOf(runes []rune, line, col int) int {
	off := 0
	for ; line > 1 && off < len(runes); off++ {
		if runes[off] == '\n' {
			line--
		}
	}
	return min(off+max(col, 0), len(runes))
}

// callName is the name before the parenthesis at off, where CEL places a call;
// otherwise the one character.
func callName(runes []rune, off int) span {
	if off >= len(runes) || runes[off] != '(' {
		return span{off, off + 1}
	}
	from := off
	for from > 0 && isNameRune(runes[from-1]) {
		from--
	}
	return span{from, max(off, from+1)}
}

func isNameRune(r rune) bool {
	return r == '_' || r >= '0' && r <= '9' || r|0x20 >= 'a' && r|0x20 <= 'z'
}

var celName = pattern(`^[A-Za-z_][A-Za-z0-9_]*$`)

// typedEnv is the language with the types of this job's contexts.
func (p *fileParser) typedEnv(info *jobInfo, sc *scope) *cel.Env {
	if sc.env != nil {
		return sc.env
	}
	var vars []cel.EnvOption
	declare := func(t *cel.Type, root string, names ...string) {
		name := root
		for _, n := range names {
			if !celName().MatchString(n) {
				return // reached only through an index, which is dynamic
			}
			name += "." + n
		}
		vars = append(vars, cel.Variable(name, t))
	}
	if p.w.On.Manual != nil {
		for _, in := range p.w.On.Manual.Inputs {
			switch in.Type {
			case InputString, InputChoice:
				declare(cel.StringType, "inputs", in.Name)
			case InputBool:
				declare(cel.BoolType, "inputs", in.Name)
			}
		}
	}
	if info != nil {
		for k, t := range info.job.Matrix.types() {
			declare(t, "matrix", k)
		}
		outputs := cel.MapType(cel.StringType, cel.StringType)
		for _, id := range info.job.Needs {
			declare(cel.StringType, "needs", id, "result")
			declare(outputs, "needs", id, "outputs")
		}
		for _, id := range info.stepIDs {
			if id != "" {
				declare(cel.StringType, "steps", id, "outcome")
				declare(cel.StringType, "steps", id, "conclusion")
				declare(outputs, "steps", id, "outputs")
			}
		}
	}
	env, err := celEnv().Extend(vars...)
	if err != nil { // names clash; that is reported elsewhere
		env = celEnv()
	}
	sc.env = env
	return env
}

// types are those of the keys whose values are all of one type. Numbers have
// none, since 1 and 1.5 differ in CEL.
func (m *Matrix) types() map[string]*cel.Type {
	out := map[string]*cel.Type{}
	if m == nil {
		return out
	}
	typeOf := func(v any) *cel.Type {
		switch v.(type) {
		case string:
			return cel.StringType
		case bool:
			return cel.BoolType
		}
		return nil
	}
	combos := m.Combinations()
	for _, k := range m.keys {
		var t *cel.Type
		for i, c := range combos {
			v, ok := c[k]
			vt := typeOf(v)
			if !ok || vt == nil || i > 0 && vt != t {
				t = nil
				break
			}
			t = vt
		}
		if t != nil {
			out[k] = t
		}
	}
	return out
}
