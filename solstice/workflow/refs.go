package workflow

import (
	"fmt"
	"slices"
	"strings"

	"cel.dev/cel-go/common/ast"
)

// span is a range of characters.
type span struct{ from, to int }

// refChecker looks at what an expression refers to.
type refChecker struct {
	p       *fileParser
	s       *site
	sc      *scope
	runes   []rune
	info    *ast.SourceInfo
	report  func(sp span, format string, args ...any) *Diagnostic
	failed  bool
	tainted []taintedRef
	dashes  []int // offsets of reported subtractions
}

// taintedRef is a reference to something that somebody else decides.
type taintedRef struct {
	path []string
	at   span
}

func (c *refChecker) walk(e ast.Expr, locals []string) {
	if path, ok := constPath(e); ok {
		if !slices.Contains(locals, path[0]) {
			c.reference(path, rootOf(e))
		}
		return
	}
	switch e.Kind() {
	case ast.SelectKind:
		c.walk(e.AsSelect().Operand(), locals)
	case ast.CallKind:
		call := e.AsCall()
		if call.IsMemberFunction() {
			c.walk(call.Target(), locals)
		}
		for _, a := range call.Args() {
			c.walk(a, locals)
		}
	case ast.ListKind:
		for _, el := range e.AsList().Elements() {
			c.walk(el, locals)
		}
	case ast.MapKind:
		for _, en := range e.AsMap().Entries() {
			c.walk(en.AsMapEntry().Key(), locals)
			c.walk(en.AsMapEntry().Value(), locals)
		}
	case ast.StructKind:
		for _, f := range e.AsStruct().Fields() {
			c.walk(f.AsStructField().Value(), locals)
		}
	case ast.ComprehensionKind:
		comp := e.AsComprehension()
		c.walk(comp.IterRange(), locals)
		c.walk(comp.AccuInit(), locals)
		inner := append(slices.Clone(locals), comp.IterVar(), comp.IterVar2(), comp.AccuVar())
		c.walk(comp.LoopCondition(), inner)
		c.walk(comp.LoopStep(), inner)
		c.walk(comp.Result(), inner)
	}
}

func rootOf(e ast.Expr) ast.Expr {
	for {
		switch e.Kind() {
		case ast.SelectKind:
			e = e.AsSelect().Operand()
		case ast.CallKind:
			e = e.AsCall().Args()[0]
		default:
			return e
		}
	}
}

// spans finds the elements of a reference in the text of the expression.
func (c *refChecker) spans(path []string, root ast.Expr) []span {
	r, _ := c.info.GetOffsetRange(root.ID())
	i := int(r.Start)
	if root.AsIdent() == spellVar { // made by string(): its argument follows
		for name := []rune(path[0]); i < len(c.runes) && !slices.Equal(c.runes[i:min(i+len(name), len(c.runes))], name); {
			i++
		}
	}
	skip := func(set string) {
		for i < len(c.runes) && strings.ContainsRune(set, c.runes[i]) {
			i++
		}
	}
	const space = " \t\r\n"
	out := make([]span, 0, len(path))
	for range path {
		skip(space + ".[")
		start := i
		switch {
		case i < len(c.runes) && strings.ContainsRune("'\"", c.runes[i]):
			quote := c.runes[i]
			for i++; i < len(c.runes) && c.runes[i] != quote; i++ {
			}
			i = min(i+1, len(c.runes))
		case i < len(c.runes) && c.runes[i] == '`':
			for i++; i < len(c.runes) && c.runes[i] != '`'; i++ {
			}
			i = min(i+1, len(c.runes))
		default:
			for i < len(c.runes) && isNameRune(c.runes[i]) {
				i++
			}
		}
		out = append(out, span{start, max(i, start+1)})
		skip(space + "]")
	}
	return out
}

// typeNames are identifiers of CEL that denote types.
var typeNames = []string{"int", "uint", "double", "bool", "string", "bytes", "list", "map", "null_type", "type", "dyn"}

// reference checks a reference outside comprehension variables.
func (c *refChecker) reference(path []string, root ast.Expr) {
	switch path[0] {
	case statusVar:
		if c.s.place != placeJobIf && c.s.place != placeStepIf {
			r, _ := c.info.GetOffsetRange(root.ID())
			c.fail(callName(c.runes, int(r.Start)), "success(), failure(), cancelled() and always() belong into an if")
		}
		return
	case spellVar:
		path = path[1:]
	}
	at := c.spans(path, root)
	if slices.Contains(typeNames, path[0]) && len(path) == 1 || strings.HasPrefix(path[0], "@") {
		return
	}
	allowed := c.s.place.contexts()
	if !slices.Contains(allowed, path[0]) {
		c.unknownContext(path, at, allowed)
		return
	}
	if c.isTainted(path) {
		c.tainted = append(c.tainted, taintedRef{path, span{at[0].from, at[len(at)-1].to}})
	}
	if len(path) == 1 {
		return
	}
	switch path[0] {
	case "matrix":
		c.matrix(path, at)
	case "inputs":
		c.input(path, at)
	case "needs":
		c.need(path, at)
	case "steps":
		c.step(path, at)
	}
}

func (c *refChecker) fail(sp span, format string, args ...any) *Diagnostic {
	c.failed = true
	return c.report(sp, format, args...)
}

func (c *refChecker) unknownContext(path []string, at []span, allowed []string) {
	name := path[0]
	if slices.Contains(placeOutputs.contexts(), name) {
		c.fail(at[0], "%s is not available in %s", name, placeRules[c.s.place].what).Allowed = allowed
		return
	}
	if c.subtraction(at[0]) {
		return
	}
	d := c.fail(at[0], "unknown context %q", name).suggest(name, allowed)
	if advice := foreignContexts[name]; advice != "" {
		d.hint("%s", advice)
		return
	}
	if len(path) == 1 && d.Hint == "" {
		for _, k := range c.keys("matrix") {
			if k == name {
				d.hint("did you mean matrix.%s?", name)
			}
		}
		for _, k := range c.keys("inputs") {
			if k == name {
				d.hint("did you mean inputs.%s?", name)
			}
		}
	}
	if len(path) == 1 && d.Hint == "" {
		d.hint("text is written in quotes: '%s'", name)
	}
}

// subtraction reports a name with dashes, which CEL reads as a subtraction:
// needs.build-linux. It looks for known ones around a span of the expression.
func (c *refChecker) subtraction(at span) bool {
	for _, root := range []string{"needs", "steps", "matrix", "inputs"} {
		for _, k := range c.keys(root) {
			full := []rune(root + "." + k)
			if !strings.Contains(k, "-") {
				continue
			}
			for from := max(0, at.from-len(full)); from <= at.from && from+len(full) <= len(c.runes); from++ {
				if !slices.Equal(c.runes[from:from+len(full)], full) {
					continue
				}
				if !slices.Contains(c.dashes, from) { // once, not for each part
					c.dashes = append(c.dashes, from)
					c.fail(span{from, from + len(full)}, "%s reads as a subtraction", string(full)).hint("write %s['%s']", root, k)
				}
				return true
			}
		}
	}
	return false
}

// keys are the names that the file gives a context.
func (c *refChecker) keys(root string) []string {
	info := c.s.job
	switch {
	case root == "inputs" && c.p.w.On.Manual != nil:
		var out []string
		for _, in := range c.p.w.On.Manual.Inputs {
			out = append(out, in.Name)
		}
		return out
	case info == nil:
		return nil
	case root == "matrix" && info.job.Matrix != nil:
		return info.job.Matrix.keys
	case root == "needs":
		return info.job.Needs
	case root == "steps":
		return c.stepIDs()
	}
	return nil
}

// stepIDs are those of the steps before this one.
func (c *refChecker) stepIDs() []string {
	var out []string
	for i, id := range c.s.job.stepIDs {
		if id != "" && i < c.s.step {
			out = append(out, id)
		}
	}
	return out
}

func (c *refChecker) matrix(path []string, at []span) {
	keys := c.keys("matrix")
	switch {
	case slices.Contains(keys, path[1]) || c.subtraction(at[0]):
	case len(keys) == 0:
		c.fail(at[1], "the job has no matrix")
	default:
		c.fail(at[1], "the matrix has no key %q", path[1]).suggest(path[1], keys)
	}
}

func (c *refChecker) input(path []string, at []span) {
	keys := c.keys("inputs")
	switch {
	case slices.Contains(keys, path[1]) || c.subtraction(at[0]):
	case len(keys) == 0:
		c.fail(at[1], "there is no input %q", path[1]).hint("declare it:\non:\n  manual:\n    inputs:\n      %s:\n        type: string", path[1])
	default:
		c.fail(at[1], "there is no input %q", path[1]).suggest(path[1], keys)
	}
}

func (c *refChecker) need(path []string, at []span) {
	needs := c.s.job.job.Needs
	if !slices.Contains(needs, path[1]) {
		if c.subtraction(at[0]) {
			return // reported at the second word
		}
		d := c.fail(at[1], "%q is not among the job's needs", path[1]).suggest(path[1], needs)
		if c.p.byID[path[1]] != nil && path[1] != c.s.job.job.ID {
			d.hint("add it: needs: [%s]", strings.Join(append(slices.Clone(needs), path[1]), ", "))
		}
		return
	}
	if len(path) > 2 && path[2] != "result" && path[2] != "outputs" {
		c.fail(at[2], "a job that is needed has no %q", path[2]).suggest(path[2], []string{"result", "outputs"})
		return
	}
	other := c.p.byID[path[1]]
	if len(path) > 3 && path[2] == "outputs" && other != nil {
		var outputs []string
		for _, kv := range other.job.Outputs {
			outputs = append(outputs, kv.Name)
		}
		if !slices.Contains(outputs, path[3]) {
			c.fail(at[3], "job %q has no output %q", path[1], path[3]).suggest(path[3], outputs)
		}
	}
}

func (c *refChecker) step(path []string, at []span) {
	ids := c.stepIDs()
	fields := []string{"outcome", "conclusion", "outputs"}
	i := slices.Index(c.s.job.stepIDs, path[1])
	switch {
	case slices.Contains(ids, path[1]):
		if len(path) > 2 && !slices.Contains(fields, path[2]) {
			c.fail(at[2], "a step has no %q", path[2]).suggest(path[2], fields)
		}
	case c.subtraction(at[0]):
	case i >= 0:
		what := "a later step"
		if i == c.s.step {
			what = "this step itself"
		}
		c.fail(at[1], "step %q is %s", path[1], what).hint("an expression sees the steps before it")
	default:
		c.fail(at[1], "there is no earlier step %q", path[1]).suggest(path[1], ids)
	}
}

// isTainted reports whether somebody else than the workflow's author decides a
// value: who sends the event, who starts a run, or a program that ran.
func (c *refChecker) isTainted(path []string) bool {
	switch path[0] {
	case "event", "inputs", "ref":
		return true
	case "needs":
		return len(path) < 3 || path[2] != "result"
	case "steps":
		return len(path) < 3 || path[2] == "outputs"
	case "env":
		if len(path) < 2 {
			return true
		}
		if t, ok := c.sc.stepEnv[path[1]]; ok {
			return t
		}
		t, ok := c.sc.taint[path[1]]
		return t || !ok // set by an earlier step through SOLSTICE_ENV
	}
	return false
}

// reportInjection refuses a tainted value in something that is executed.
func (p *fileParser) reportInjection(c *refChecker, s *site, part part) {
	t := c.tainted[0]
	c.failed = true
	d := c.report(span{0, len(c.runes)}, "%s in %s lets others run commands: it becomes part of the script before a shell sees it",
		strings.Join(t.path, "."), placeRules[s.place].what)
	if s.place != placeRun {
		d.Message = fmt.Sprintf("%s in %s lets others choose what runs", strings.Join(t.path, "."), placeRules[s.place].what)
		d.hint("decide it in a step's script, with the value passed through env")
		return
	}
	name, known := envName(t.path), t.path[0] == "env" && len(t.path) == 2
	use := `"$` + name + `"`
	switch shell := strings.ToLower(firstWord(s.shell, c.p.w.Defaults.Shell)); {
	case strings.Contains(shell, "python"):
		use = `os.environ["` + name + `"]`
	case strings.Contains(shell, "pwsh"):
		use = "$env:" + name
	}
	if known {
		d.hint("the variable is in the step's environment: write %s", use)
		return
	}
	d.hint("pass it through the environment:\nenv:\n  %s: ${{ %s }}\nrun: … %s …", name, strings.Join(strings.Fields(part.text), " "), use)
}

func firstWord(candidates ...string) string {
	for _, s := range candidates {
		if f := strings.Fields(s); len(f) > 0 {
			return f[0]
		}
	}
	return ""
}

// envName is a variable's name for a reference: needs.build.outputs.version
// becomes BUILD_VERSION.
func envName(path []string) string {
	if path[0] == "env" && len(path) == 2 {
		return path[1]
	}
	var words []string
	for i, w := range path {
		if w == "outputs" || i == 0 && len(path) > 2 && (w == "needs" || w == "steps") {
			continue
		}
		if i == 0 && w == "inputs" {
			w = "input"
		}
		words = append(words, w)
	}
	up := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, strings.Join(words, "_"))
	return up
}
