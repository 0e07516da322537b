package workflow_test

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

// FuzzParse: whatever the bytes, Parse returns, its diagnostics have places in
// the file, and what it accepts can be planned, survives JSON, and never lets a
// tainted context into a script.
func FuzzParse(f *testing.F) {
	for _, dir := range []string{"good", "broken"} {
		for _, src := range files(f, dir) {
			f.Add(src)
		}
	}
	f.Add([]byte("\ufeffjobs: {a: {steps: [{run: \"\\u00e9 ${{ sha }}\"}]}}\r\n"))
	f.Add([]byte("jobs: {a: {if: \"${{ '${{' == '}}' }}\", steps: [{run: 'it''s ${{ [1].map(x, x) }}'}]}}"))
	f.Fuzz(func(t *testing.T, src []byte) {
		w, diags := workflow.Parse(workflow.File, src)
		if w == nil {
			t.Fatal("no workflow")
		}
		checkPositions(t, []byte(strings.ToValidUTF8(string(src), "\ufffd")), diags)
		_ = diags.String()
		w.Match(workflow.Trigger{Kind: workflow.Push, Ref: "refs/heads/a/b", ChangedPaths: []string{"a/b.go"}})
		p, more := w.Plan(workflow.PlanOptions{})
		if diags.HasErrors() {
			if p != nil || !more.HasErrors() {
				t.Fatal("a broken workflow was planned")
			}
			return
		}
		if p == nil {
			if !more.HasErrors() {
				t.Fatal("neither plan nor error")
			}
			return
		}
		if len(p.Jobs) == 0 || len(p.Jobs) > workflow.MaxJobs {
			t.Fatalf("%d jobs", len(p.Jobs))
		}
		b, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var back workflow.Plan
		if err := json.Unmarshal(b, &back); err != nil || !reflect.DeepEqual(*p, back) {
			t.Fatalf("round trip: %v\n%+v\n%+v", err, *p, back)
		}
		noInjection(t, p)
	})
}

// noInjection interpolates scripts with a canary in everything that others
// decide; it must not come out.
func noInjection(t *testing.T, p *workflow.Plan) {
	const canary = "CANARY;$(id)"
	v := workflow.Values{"title": canary, "x": canary, "number": canary}
	cx := workflow.Contexts{Event: v, Inputs: v, Ref: canary, SHA: "0123", Repo: "o/r", Needs: map[string]workflow.Need{}, Steps: map[string]workflow.StepState{}}
	outputs := map[string]string{"tag": canary, "v": canary, "value": canary}
	for _, j := range p.Jobs {
		cx.Matrix = j.Matrix
		for _, n := range j.Needs {
			cx.Needs[n] = workflow.Need{Result: "success", Outputs: outputs}
		}
		if env, err := cx.InterpolateEnv(j.Env); err == nil {
			cx.Env = map[string]string{}
			for _, kv := range env {
				cx.Env[kv.Name] = kv.Value
			}
		}
		for _, s := range j.Steps {
			for _, text := range []string{s.Run, s.Shell, j.Setup} {
				if got, err := cx.Interpolate(text); err == nil && strings.Contains(got, "CANARY") && !strings.Contains(text, "CANARY") {
					t.Fatalf("%q became %q", text, got)
				}
			}
			if s.ID != "" {
				cx.Steps[s.ID] = workflow.StepState{Outcome: "success", Conclusion: "success", Outputs: outputs}
			}
		}
	}
}

// FuzzInterpolate: whatever the text, the result is one, or an error that says
// the text is wrong; and text without expressions stays as it is.
func FuzzInterpolate(f *testing.F) {
	for _, s := range []string{
		"", "plain", "${{ sha }}", "${{ matrix.go }}-${{ string(matrix.go) }}", "${{ '}}' }}", "${{ {'a': {'b': 1}} }}", "${{", "${{ }}", "}}${{",
		"${{ event.labels.map(l, l + 'x').filter(l, l.size() > 1) }}", "${{ '''a''' + r\"\\\" }}", "${{ has(event.x) ? event.x : needs.build.outputs.v }}",
		"${{ 'a'.matches('(a+)+$') }}", "${{ success() && always() }}", "${{ 1.0 / 0.0 }}", "${{ -9223372036854775808 / -1 }}", "${{ b'\\xff' }}", "${{ timestamp('2026-01-01T00:00:00Z') }}",
		"${{ inputs['dry-run'] }}${{ inputs.`dry-run` }}", "${{ \"\\u00e9日\" }}", "${{ dyn([1]) }}", "${{ type(1) }}", "${{ {1: 2} }}",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		cx := contexts()
		got, err := cx.Interpolate(s)
		switch {
		case err != nil && !errors.Is(err, workflow.ErrInvalid):
			t.Fatalf("%q: %v is not ErrInvalid", s, err)
		case err == nil && !strings.Contains(s, "${{") && got != s:
			t.Fatalf("%q became %q", s, got)
		}
		if !reflect.DeepEqual(cx, contexts()) {
			t.Fatalf("%q changed the contexts", s)
		}
		for _, status := range []string{workflow.StatusSuccess, workflow.StatusFailure} {
			cx.Status = status
			if _, err := cx.Condition(s); err != nil && !errors.Is(err, workflow.ErrInvalid) {
				t.Fatalf("condition %q: %v is not ErrInvalid", s, err)
			}
		}
	})
}
