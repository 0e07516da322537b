package workflow

import (
	"fmt"
	"strings"

	"github.com/bmatcuk/doublestar/v4"
)

// TriggerKind is a kind of event that a workflow can ask for.
type TriggerKind string

// Kinds of triggers, as they are called in workflow files.
const (
	Push        TriggerKind = "push"
	PullRequest TriggerKind = "pull_request"
	Tag         TriggerKind = "tag"
	Manual      TriggerKind = "manual"
)

// Trigger is an event, as far as Match looks at it.
type Trigger struct {
	Kind TriggerKind // a Push of a ref below refs/tags/ counts as Tag
	Ref  string      // full, e.g. refs/heads/main
	// BaseRef of a pull request is the branch it would merge into, full or
	// short.
	BaseRef string
	// ChangedPaths, slash-separated from the repository's root. Nil means
	// unknown: path filters then match.
	ChangedPaths []string
}

// Triggers says what starts a workflow. A nil member: that does not.
type Triggers struct {
	Push        *Filter
	PullRequest *Filter
	Tag         *Filter
	Manual      *ManualTrigger
}

// Filter narrows an event. A nil list lets everything through.
//
// A pattern is a glob in which * matches within a path element, ** any number
// of elements, ? one character, [a-z] and {a,b} alternatives. A pattern that
// begins with ! negates; the last pattern that matches decides, and what no
// pattern matches is let through only when the list begins with a negation.
type Filter struct {
	Branches []string // of a pull request: the branch it would merge into
	Tags     []string
	Paths    []string // one changed path that passes is enough
}

// ManualTrigger lets people start the workflow.
type ManualTrigger struct {
	Inputs []Input // in the file's order
}

// Match reports whether the workflow asks for this event; why says in words
// what decided, for logs and people.
func (w *Workflow) Match(t Trigger) (ok bool, why string) {
	if t.Kind == Push && strings.HasPrefix(t.Ref, "refs/tags/") {
		t.Kind = Tag
	}
	var f *Filter
	switch t.Kind {
	case Push:
		f = w.On.Push
	case PullRequest:
		f = w.On.PullRequest
	case Tag:
		f = w.On.Tag
	case Manual:
		if w.On.Manual != nil {
			return true, "manual is listed under on"
		}
	default:
		return false, fmt.Sprintf("%q is not a kind of event", t.Kind)
	}
	if f == nil {
		return false, fmt.Sprintf("%s is not listed under on", t.Kind)
	}
	list, name, what := f.Branches, strings.TrimPrefix(t.Ref, "refs/heads/"), "branch"
	switch t.Kind {
	case PullRequest:
		name, what = strings.TrimPrefix(t.BaseRef, "refs/heads/"), "target branch"
	case Tag:
		list, name, what = f.Tags, strings.TrimPrefix(t.Ref, "refs/tags/"), "tag"
	}
	if pass, by := filter(list, name); !pass {
		return false, fmt.Sprintf("%s %q %s", what, name, by)
	}
	if f.Paths == nil || t.ChangedPaths == nil {
		return true, fmt.Sprintf("%s of %s %q", t.Kind, what, name)
	}
	for _, p := range t.ChangedPaths {
		if pass, _ := filter(f.Paths, p); pass {
			return true, fmt.Sprintf("%s of %s %q, path %q changed", t.Kind, what, name, p)
		}
	}
	return false, fmt.Sprintf("none of %d changed paths passes the path filter", len(t.ChangedPaths))
}

// filter applies patterns; by says which decided against.
func filter(patterns []string, name string) (pass bool, by string) {
	if patterns == nil {
		return true, ""
	}
	by = "matches no pattern"
	for i, p := range patterns {
		p, negated := strings.CutPrefix(p, "!")
		if i == 0 && negated {
			pass = true
		}
		if doublestar.MatchUnvalidated(p, name) {
			pass, by = !negated, fmt.Sprintf("is excluded by !%s", p)
		}
	}
	return pass, by
}

// validPattern says what is wrong with a pattern, "" when nothing is.
func validPattern(p string) string {
	p = strings.TrimPrefix(p, "!")
	switch {
	case p == "":
		return "is empty"
	case len(p) > 512:
		return "is longer than 512 bytes"
	case strings.HasPrefix(p, "!"):
		return "is negated twice"
	case strings.HasPrefix(p, "/"), strings.HasPrefix(p, "./"):
		return "begins with a slash or dot: patterns are relative to the repository's root"
	case !doublestar.ValidatePattern(p):
		return "is not a valid glob"
	}
	return ""
}
