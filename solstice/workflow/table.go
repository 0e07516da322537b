package workflow

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.yaml.in/yaml/v4"
)

// kind of value that a shape describes.
type kind int

const (
	kindText     kind = iota // any scalar, as written
	kindBool                 // true or false
	kindInt                  // whole number
	kindDuration             // 30m, 1h30m, or a number of minutes
	kindList
	kindMap
	kindAny   // plain data, in a matrix
	kindOneOf // the alternative that fits the kind of node
)

// shape defines a part of the file format. The parser checks against it and
// the JSON Schema is made of it.
type shape struct {
	kind     kind
	def      string // name under $defs in the schema, "" for inline
	doc      string
	fields   []field           // of a mapping: its fixed keys
	keys     *word             // of a mapping that has free keys too: what they look like
	elem     *shape            // of the items of a list, of the values under free keys
	min, max int               // number of entries; max 0: any
	word     *word             // what a text looks like
	enum     []string          // what a text may be
	alts     []*shape          // of kindOneOf
	null     bool              // may be left empty
	foreign  map[string]string // advice about keys that other systems have here
}

type field struct {
	name     string
	shape    *shape
	required bool
	doc      string
}

// pattern is a regular expression that is compiled when it is first used: every
// agent is a process that starts with this package and needs none of them.
func pattern(expr string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expr) })
}

// word is a pattern with a name.
type word struct {
	re     func() *regexp.Regexp
	not    func() *regexp.Regexp // reserved
	what   string
	advice string
}

var (
	identWord = &word{
		re:   pattern(`^[A-Za-z_][A-Za-z0-9_-]{0,63}$`),
		what: "letters, digits, - and _, not beginning with a digit, at most 64",
	}
	envWord = &word{
		re: pattern(`^[A-Za-z_][A-Za-z0-9_]{0,127}$`), what: "letters, digits and _, not beginning with a digit",
		not: pattern(`^SOLSTICE(_|$)`), advice: "names that begin with SOLSTICE are Solstice's own",
	}
	durationRE = pattern(`^([0-9]{1,9}(\.[0-9]{1,9})?[hms])+$`)
)

// Shapes that occur in several places.
var (
	textShape     = &shape{kind: kindText}
	boolShape     = &shape{kind: kindBool}
	durationShape = &shape{kind: kindDuration}
	envShape      = &shape{kind: kindMap, def: "env", keys: envWord, elem: &shape{kind: kindText}, doc: "Environment variables; values may hold ${{ }}."}
	patternsShape = oneOf(
		&shape{kind: kindText},
		&shape{kind: kindList, elem: textShape, min: 1, max: 200},
	)
	checkoutShape = &shape{
		kind: kindOneOf, def: "checkout", doc: "How the commit comes into the work tree; false: not at all.",
		alts: []*shape{boolShape, {kind: kindMap, fields: []field{
			{name: "depth", shape: &shape{kind: kindInt}, doc: "Commits of history; 0 is all of it. Default 1."},
			{name: "submodules", shape: boolShape, doc: "Check out submodules, recursively."},
			{name: "lfs", shape: boolShape, doc: "Fetch Git LFS objects, from the repository's own server and without credentials; needs git-lfs on the machine."},
		}, foreign: map[string]string{"fetch-depth": "depth"}}},
	}
	stepShape = &shape{
		kind: kindMap, def: "step", foreign: map[string]string{
			"uses":              "there are no actions: write what it does as a run script",
			"with":              "there are no actions: write what it does as a run script",
			"working-directory": "workdir",
			"timeout-minutes":   "timeout",
			"continue_on_error": "continue-on-error",
		},
		fields: []field{
			{name: "id", shape: &shape{kind: kindText, word: identWord}, doc: "Name for steps.<id> in expressions, unique in the job."},
			{name: "name", shape: textShape, doc: "Name for people. Default: the first line of run."},
			{name: "run", shape: textShape, required: true, doc: "The script."},
			{name: "shell", shape: textShape, doc: "sh (default), bash, python, pwsh, or a command line in which {0} is the script's file."},
			{name: "workdir", shape: textShape, doc: "Directory to run in, relative to the work tree."},
			{name: "env", shape: envShape},
			{name: "if", shape: textShape, doc: "Condition (CEL). Without success(), failure(), cancelled() or always() it implies success()."},
			{name: "timeout", shape: durationShape, doc: "At most this long, then the step has failed. Default: the job's."},
			{name: "continue-on-error", shape: boolShape, doc: "A failure of this step does not fail the job."},
		},
	}
	matrixShape = &shape{
		kind: kindMap, def: "matrix", doc: "One job per combination of values.", keys: identWord, min: 1,
		elem: &shape{kind: kindList, elem: &shape{kind: kindAny}, min: 1},
		fields: []field{
			{name: "include", shape: &shape{kind: kindList, elem: &shape{kind: kindMap, keys: identWord, elem: &shape{kind: kindAny}, min: 1}}, doc: "Values to add to the combinations they fit, or further combinations."},
			{name: "exclude", shape: &shape{kind: kindList, elem: &shape{kind: kindMap, keys: identWord, elem: &shape{kind: kindAny}, min: 1}}, doc: "Combinations to leave out; a part of the keys is enough."},
		},
	}
	jobShape = &shape{
		kind: kindMap, def: "job", foreign: map[string]string{
			"strategy":          "write matrix directly under the job",
			"timeout-minutes":   "timeout",
			"container":         "a job runs on a machine of its own: choose it with runs-on",
			"services":          "start services in a step; the machine is the job's own",
			"uses":              "there are no reusable workflows",
			"permissions":       "a job holds no forge credentials",
			"concurrency":       "it is a key of the workflow",
			"continue-on-error": "it is a key of steps",
			"defaults":          "it is a key of the workflow",
			"runs_on":           "runs-on",
			"depends-on":        "needs",
		},
		fields: []field{
			{name: "name", shape: textShape, doc: "Name for people. Default: the job's key."},
			{name: "runs-on", shape: textShape, doc: "Label of the pool of machines to run on; may hold ${{ }}."},
			{name: "needs", shape: oneOf(&shape{kind: kindText}, &shape{kind: kindList, elem: textShape, min: 1}), doc: "Jobs that have to end first."},
			{name: "if", shape: textShape, doc: "Condition (CEL). Without success(), failure(), cancelled() or always() it implies success()."},
			{name: "matrix", shape: matrixShape},
			{name: "env", shape: envShape},
			{name: "timeout", shape: durationShape, doc: "At most this long. Default 60m."},
			{name: "checkout", shape: checkoutShape},
			{name: "setup", shape: textShape, doc: "Path of a script in the repository that runs before the steps."},
			{name: "steps", shape: &shape{kind: kindList, elem: stepShape, min: 1, max: MaxSteps}, required: true},
			{name: "outputs", shape: &shape{kind: kindMap, keys: identWord, elem: textShape}, doc: "What jobs that need this one see as needs.<id>.outputs; values may hold ${{ }}."},
		},
	}
	inputShape = &shape{
		kind: kindMap, def: "input", null: true, fields: []field{
			{name: "type", shape: &shape{kind: kindText, enum: []string{"string", "bool", "number", "choice"}}, doc: "Default string."},
			{name: "description", shape: textShape},
			{name: "default", shape: textShape},
			{name: "required", shape: boolShape, doc: "A person starting the workflow has to give it."},
			{name: "options", shape: &shape{kind: kindList, elem: textShape, min: 1, max: 100}, doc: "What a choice may be."},
		},
	}
	onShape = oneOf(
		&shape{kind: kindText, enum: triggerNames},
		&shape{kind: kindList, elem: &shape{kind: kindText, enum: triggerNames}, min: 1},
		&shape{kind: kindMap, min: 1, foreign: map[string]string{
			"workflow_dispatch": "manual", "tags": "tag", "pull_request_target": "pull_request", "merge_request": "pull_request",
			"schedule": "", "release": "tag",
		}, fields: []field{
			{name: "push", doc: "A branch was pushed.", shape: &shape{kind: kindMap, null: true, foreign: branchAdvice, fields: []field{
				{name: "branches", shape: patternsShape, doc: "Patterns; ! negates, the last match decides."},
				{name: "paths", shape: patternsShape, doc: "Patterns for changed files; ! negates, the last match decides."},
			}}},
			{name: "pull_request", doc: "A pull request was opened or changed.", shape: &shape{kind: kindMap, null: true, foreign: branchAdvice, fields: []field{
				{name: "branches", shape: patternsShape, doc: "Patterns for the branch it would merge into."},
				{name: "paths", shape: patternsShape, doc: "Patterns for changed files; ! negates, the last match decides."},
			}}},
			{name: "tag", doc: "A tag was pushed.", shape: &shape{kind: kindMap, null: true, fields: []field{
				{name: "tags", shape: patternsShape, doc: "Patterns; ! negates, the last match decides."},
			}}},
			{name: "manual", doc: "A person starts it.", shape: &shape{kind: kindMap, null: true, fields: []field{
				{name: "inputs", shape: &shape{kind: kindMap, keys: identWord, elem: inputShape, max: 100}},
			}}},
		}},
	)
	rootShape = &shape{
		kind: kindMap, doc: "A Solstice workflow.", foreign: map[string]string{
			"permissions": "a job holds no forge credentials", "run-name": "name", "true": `write "on"`, "steps": "steps belong to a job: jobs.<id>.steps",
			"matrix": "a matrix belongs to a job: jobs.<id>.matrix", "triggers": "on",
		},
		fields: []field{
			{name: "name", shape: textShape, doc: "Name of the workflow. Default: the file's."},
			{name: "on", shape: onShape, doc: "What starts it. Default: push, pull_request and manual."},
			{name: "env", shape: envShape},
			{name: "defaults", doc: "For every job and step that does not say otherwise.", shape: &shape{kind: kindMap, foreign: map[string]string{
				"run": "write shell and workdir directly under defaults", "working-directory": "workdir",
			}, fields: []field{
				{name: "runs-on", shape: textShape},
				{name: "shell", shape: textShape},
				{name: "workdir", shape: textShape},
				{name: "timeout", shape: durationShape, doc: "Of jobs."},
			}}},
			{name: "checkout", shape: checkoutShape},
			{name: "concurrency", shape: oneOf(textShape, &shape{kind: kindMap, fields: []field{
				{name: "group", shape: textShape, required: true, doc: "Of its runs in a repository one is under way at a time; may hold ${{ }}."},
				{name: "cancel-in-progress", shape: boolShape, doc: "A new run ends the older ones, instead of waiting for them."},
			}})},
			{name: "jobs", required: true, shape: &shape{kind: kindMap, keys: identWord, elem: jobShape, min: 1, max: MaxJobs}},
		},
	}
	triggerNames = []string{string(Push), string(PullRequest), string(Tag), string(Manual)}
	branchAdvice = map[string]string{
		"branches-ignore": "use branches with a pattern that begins with !", "paths-ignore": "use paths with a pattern that begins with !",
		"tags": "tags have an event of their own: on.tag.tags", "types": "", "branch": "branches",
	}
)

func oneOf(alts ...*shape) *shape { return &shape{kind: kindOneOf, alts: alts} }

func (s *shape) what() string {
	switch s.kind {
	case kindBool:
		return "true or false"
	case kindInt:
		return "a whole number"
	case kindDuration:
		return "a duration such as 30m"
	case kindList:
		return "a list"
	case kindMap:
		return "a mapping"
	case kindOneOf:
		var w []string
		for _, a := range s.alts {
			w = append(w, a.what())
		}
		last := len(w) - 1
		return strings.Join(w[:last], ", ") + " or " + w[last]
	}
	return "text"
}

func (s *shape) accepts(n *yaml.Node) bool {
	switch s.kind {
	case kindList:
		return n.Kind == yaml.SequenceNode
	case kindMap:
		return n.Kind == yaml.MappingNode || s.null && n.Kind == yaml.ScalarNode && n.ShortTag() == tagNull
	case kindAny:
		return true
	case kindOneOf:
		return slices.ContainsFunc(s.alts, func(a *shape) bool { return a.accepts(n) })
	}
	return isScalar(n)
}

// check reports how a node differs from a shape; name is what it is called.
func (r *reporter) check(n *yaml.Node, s *shape, name string) {
	n = deref(n)
	report := func(format string, args ...any) *Diagnostic {
		return r.at(nodePos(n), nodeWidth(n), name+" "+format, args...)
	}
	if !s.accepts(n) {
		d := report("must be %s, not %s", s.what(), describe(n))
		if s.kind == kindText && n.Kind == yaml.MappingNode && n.Style&yaml.FlowStyle != 0 && strings.Contains(string(r.src.lines[n.Line-1]), "{{") {
			d.hint("a value that begins with ${{ or {{ needs quotes")
		}
		return
	}
	switch s.kind {
	case kindOneOf:
		for _, a := range s.alts {
			if a.accepts(n) {
				r.check(n, a, name)
				return
			}
		}
	case kindText:
		switch {
		case s.enum != nil && !slices.Contains(s.enum, n.Value):
			report("cannot be %q", n.Value).suggest(n.Value, s.enum)
		case s.word != nil:
			r.checkWord(n, s.word, name)
		}
	case kindBool:
		if n.ShortTag() != tagBool {
			d := report("must be true or false, not %q", n.Value)
			if strings.Contains(n.Value, "${{") {
				d.hint("expressions are not evaluated here")
			}
		}
	case kindInt:
		if v, err := strconv.Atoi(n.Value); err != nil || n.ShortTag() != tagInt || v < 0 || v > 1_000_000_000 {
			report("must be a whole number, 0 or more, not %q", n.Value)
		}
	case kindDuration:
		if _, err := parseDuration(n); err != nil {
			report("%s", err).hint("write 90s, 30m, 1h30m, or a number of minutes")
		}
	case kindList:
		r.checkSize(n, s, name, len(n.Content))
		for i, c := range items(n) {
			r.check(c, s.elem, fmt.Sprintf("%s[%d]", name, i))
		}
	case kindMap:
		r.checkMap(n, s, name)
	}
}

func (r *reporter) checkSize(n *yaml.Node, s *shape, name string, size int) {
	switch {
	case size < s.min:
		r.at(nodePos(n), nodeWidth(n), "%s is empty", name)
	case s.max > 0 && size > s.max:
		r.at(nodePos(n), nodeWidth(n), "%s has %d entries, at most %d are allowed", name, size, s.max)
	}
}

func (r *reporter) checkWord(n *yaml.Node, w *word, name string) {
	switch {
	case !w.re().MatchString(n.Value):
		r.at(nodePos(n), nodeWidth(n), "%s %q is not a name", name, n.Value).hint("a name here is %s", w.what)
	case w.not != nil && w.not().MatchString(n.Value):
		r.at(nodePos(n), nodeWidth(n), "%s %q is reserved", name, n.Value).hint("%s", w.advice)
	}
}

func (r *reporter) checkMap(n *yaml.Node, s *shape, name string) {
	r.checkSize(n, s, name, len(n.Content)/2)
	known := make([]string, len(s.fields))
	for i, f := range s.fields {
		known[i] = f.name
		if f.required && n.Kind == yaml.MappingNode && get(n, f.name) == nil {
			r.at(nodePos(n), 1, "%s is missing %q", name, f.name)
		}
	}
	for k, v := range entries(n) {
		child := name + "." + k.Value
		if s == rootShape {
			child = k.Value
		}
		i := slices.Index(known, k.Value)
		switch {
		case i >= 0:
			r.check(v, s.fields[i].shape, child)
		case s.keys != nil:
			r.checkWord(k, s.keys, "the key")
			r.check(v, s.elem, child)
		default:
			d := r.at(nodePos(k), nodeWidth(k), "unknown key %q in %s", k.Value, name).suggest(k.Value, known)
			if advice, ok := s.foreign[k.Value]; ok {
				switch {
				case slices.Contains(known, advice):
					d.Hint = fmt.Sprintf("did you mean %q?", advice)
				case advice == "":
					d.Hint = "there is no such feature"
				default:
					d.Hint = advice
				}
			}
		}
	}
}

// parseDuration reads what kindDuration allows.
func parseDuration(n *yaml.Node) (time.Duration, error) {
	var d time.Duration
	if n.ShortTag() == tagInt {
		minutes, err := strconv.Atoi(n.Value)
		if err != nil || minutes > int(MaxTimeout/time.Minute) || minutes < 0 {
			return 0, fmt.Errorf("must be at most %s, not %s minutes", fmtDuration(MaxTimeout), n.Value)
		}
		d = time.Duration(minutes) * time.Minute
	} else {
		var err error
		if !durationRE().MatchString(n.Value) {
			return 0, fmt.Errorf("must be a duration, not %q", n.Value)
		}
		if d, err = time.ParseDuration(n.Value); err != nil {
			return 0, fmt.Errorf("must be a duration, not %q", n.Value)
		}
	}
	switch {
	case d <= 0:
		return 0, fmt.Errorf("must be more than 0, not %q", n.Value)
	case d > MaxTimeout:
		return 0, fmt.Errorf("must be at most %s, not %q", fmtDuration(MaxTimeout), n.Value)
	}
	return d, nil
}

func fmtDuration(d time.Duration) string { return fmt.Sprintf("%dh", int(d.Hours())) }
