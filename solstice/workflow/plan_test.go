package workflow_test

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

func mustParse(t testing.TB, src string) *workflow.Workflow {
	t.Helper()
	w, diags := workflow.Parse(workflow.File, []byte(src))
	if diags.HasErrors() {
		t.Fatalf("%s\n%s", src, diags)
	}
	return w
}

func jobNames(p *workflow.Plan) []string {
	var out []string
	for _, j := range p.Jobs {
		out = append(out, j.Name)
	}
	return out
}

func TestPlanInputs(t *testing.T) {
	w := mustParse(t, `
on:
  manual:
    inputs:
      s: {default: x}
      b: {type: bool}
      n: {type: number, default: 1.20}
      c: {type: choice, options: [low, high]}
      r: {required: true, description: why it is started}
jobs:
  test:
    steps: [{run: make}]
`)
	num := func(s string) json.Number { return json.Number(s) }
	for _, c := range []struct {
		name string
		o    workflow.PlanOptions
		want workflow.Values
		err  string
	}{
		{"no person", workflow.PlanOptions{}, workflow.Values{"s": "x", "b": false, "n": num("1.20"), "c": "low", "r": ""}, ""},
		{
			"all",
			workflow.PlanOptions{Inputs: map[string]string{"s": "", "b": "true", "n": "-3", "c": "high", "r": "yes"}},
			workflow.Values{"s": "", "b": true, "n": num("-3"), "c": "high", "r": "yes"},
			"",
		},
		{"required", workflow.PlanOptions{Trigger: workflow.Manual}, nil, "input r is required"},
		{"required, others given", workflow.PlanOptions{Inputs: map[string]string{"s": "y"}}, nil, "why it is started"},
		{"bool", workflow.PlanOptions{Inputs: map[string]string{"b": "yes", "r": "x"}}, nil, `must be true or false, not "yes"`},
		{"number", workflow.PlanOptions{Inputs: map[string]string{"n": "0x1F", "r": "x"}}, nil, `must be a number, not "0x1F"`},
		{"huge number", workflow.PlanOptions{Inputs: map[string]string{"n": "1e999", "r": "x"}}, nil, `must be a number`},
		{"choice", workflow.PlanOptions{Inputs: map[string]string{"c": "medium", "r": "x"}}, nil, "allowed: low, high"},
		{"unknown", workflow.PlanOptions{Inputs: map[string]string{"R": "x", "r": "x"}}, nil, `no input "R"`},
		{"too long", workflow.PlanOptions{Inputs: map[string]string{"s": strings.Repeat("x", workflow.MaxScalar+1), "r": "x"}}, nil, "bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, diags := w.Plan(c.o)
			if c.err != "" {
				if p != nil || !diags.HasErrors() || !strings.Contains(diags.String(), c.err) {
					t.Errorf("got %v, want an error with %q:\n%s", p, c.err, diags)
				}
				return
			}
			if diags.HasErrors() {
				t.Fatal(diags)
			}
			if !reflect.DeepEqual(p.Inputs, c.want) {
				t.Errorf("got %v, want %v", p.Inputs, c.want)
			}
		})
	}
}

func TestPlanSelectsJobs(t *testing.T) {
	w := mustParse(t, `
jobs:
  a: {steps: [{run: x}]}
  b: {needs: a, steps: [{run: x}]}
  c: {steps: [{run: x}]}
  d: {needs: [b], steps: [{run: x}]}
`)
	for want, ids := range map[string][]string{"a b c d": nil, "a b d": {"d"}, "c": {"c"}, "a b c": {"c", "b"}} {
		p, diags := w.Plan(workflow.PlanOptions{Jobs: ids})
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		if got := strings.Join(jobNames(p), " "); got != want {
			t.Errorf("%v: got %s, want %s", ids, got, want)
		}
	}
	if p, diags := w.Plan(workflow.PlanOptions{Jobs: []string{"bb"}}); p != nil || !strings.Contains(diags.String(), `no job "bb"`) {
		t.Errorf("an unknown job: %v, %s", p, diags)
	}
}

func TestPlanResolves(t *testing.T) {
	w := mustParse(t, `
defaults: {timeout: 45m, shell: bash, runs-on: "host"}
checkout: {submodules: true}
on: {manual: {inputs: {pool: {default: big}}}}
jobs:
  a:
    name: "${{ matrix.os }} of ${{ repo }}"
    runs-on: ${{ matrix.os }}-${{ inputs.pool }}-${{ event.size }}
    matrix: {os: [linux, bsd], x: [1, 2]}
    timeout: 5
    checkout: false
    steps:
      - name: on ${{ matrix.os }}
        run: x
      - name: with ${{ env.X }}
        run: |
          ${{ sha +
              sha }}
        shell: sh
        timeout: 90s
  b:
    steps: [{run: x}]
`)
	p, diags := w.Plan(workflow.PlanOptions{Contexts: workflow.Contexts{Repo: "o/r", SHA: "1", Event: workflow.Values{"size": json.Number("1.0")}}})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	want := []string{"linux of o/r", "linux of o/r (os linux, x 2)", "bsd of o/r", "bsd of o/r (os bsd, x 2)", "b"}
	if got := jobNames(p); !reflect.DeepEqual(got, want) {
		t.Errorf("names %q, want %q", got, want)
	}
	a, b := p.Jobs[0], p.Jobs[4]
	if a.RunsOn != "linux-big-1.0" || a.Timeout != 5*time.Minute || !a.Checkout.Disabled {
		t.Errorf("job a: %+v", a)
	}
	if s := a.Steps; s[0].Name != "on linux" || s[1].Name != "with ${{ env.X }}" || s[0].Shell != "bash" || s[1].Shell != "sh" || s[1].Timeout != 90*time.Second {
		t.Errorf("steps of a: %+v", s)
	}
	if b.RunsOn != "host" || b.Timeout != 45*time.Minute || b.Checkout != (workflow.Checkout{Depth: 1, Submodules: true}) {
		t.Errorf("job b: %+v", b)
	}
	if d := mustParse(t, "jobs: {a: {steps: [{run: x}]}}"); true {
		if p, _ := d.Plan(workflow.PlanOptions{}); p.Jobs[0].Timeout != workflow.DefaultTimeout || p.Jobs[0].RunsOn != "" {
			t.Errorf("defaults: %+v", p.Jobs[0])
		}
	}
}

func TestPlanErrors(t *testing.T) {
	w := mustParse(t, "jobs:\n  a:\n    runs-on: ${{ event.pool.name }}\n    steps: [{run: x}]\n  b:\n    runs-on: ${{ event.empty }}\n    steps: [{run: x}]\n")
	p, diags := w.Plan(workflow.PlanOptions{Contexts: workflow.Contexts{Event: workflow.Values{"empty": ""}}})
	if p != nil || len(diags) != 2 || diags[0].Line != 3 || diags[1].Line != 6 || !strings.Contains(diags[1].Message, "comes to nothing") {
		t.Errorf("%v\n%s", p, diags)
	}

	var b strings.Builder
	b.WriteString("jobs:\n")
	for i := range 3 {
		fmt.Fprintf(&b, "  j%d:\n    matrix: {a: [1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16], b: [1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]}\n    steps: [{run: x}]\n", i)
	}
	p, diags = mustParse(t, b.String()).Plan(workflow.PlanOptions{})
	if p != nil || !strings.Contains(diags.String(), "more than 512 jobs") {
		t.Errorf("768 jobs: %s", diags)
	}
}

// TestPlanRoundTrip: a plan comes back from JSON as it was.
func TestPlanRoundTrip(t *testing.T) {
	check := func(t interface{ Fatalf(string, ...any) }, p *workflow.Plan) {
		b, err := json.Marshal(p)
		if err != nil {
			t.Fatalf("%v", err)
		}
		var back workflow.Plan
		if err := json.Unmarshal(b, &back); err != nil {
			t.Fatalf("%v", err)
		}
		if !reflect.DeepEqual(*p, back) {
			t.Fatalf("got %+v\nwant %+v", back, *p)
		}
	}
	for name, src := range files(t, "good") {
		t.Run(name, func(t *testing.T) {
			p, diags := mustParse(t, string(src)).Plan(workflow.PlanOptions{Contexts: workflow.Contexts{Event: workflow.Values{"title": "x"}}})
			if diags.HasErrors() {
				t.Fatal(diags)
			}
			check(t, p)
		})
	}
	rapid.Check(t, func(rt *rapid.T) {
		src := rapidWorkflow(rt)
		w, diags := workflow.Parse(workflow.File, []byte(src))
		if diags.HasErrors() {
			rt.Fatalf("%s\n%s", src, diags)
		}
		p, diags := w.Plan(workflow.PlanOptions{})
		if diags.HasErrors() {
			rt.Fatalf("%s\n%s", src, diags)
		}
		names := map[string]bool{}
		for _, j := range p.Jobs {
			if names[j.Name] {
				rt.Fatalf("two jobs are called %q", j.Name)
			}
			names[j.Name] = true
		}
		check(rt, p)
	})
}

// rapidWorkflow draws a valid workflow as JSON, which is YAML.
func rapidWorkflow(t *rapid.T) string {
	scalar := rapid.OneOf(rapid.Map(rapid.StringMatching(`[a-z:#'"\\ 日\n\t-]{0,12}`), func(s string) any { return s }),
		rapid.Map(rapid.SampledFrom([]string{"1.20", "0", "-7", "1e3", "2.50"}), func(s string) any { return json.Number(s) }),
		rapid.Map(rapid.Bool(), func(b bool) any { return b }))
	env := rapid.MapOfN(rapid.StringMatching(`[A-Z]{1,5}`), scalar, 0, 3)
	jobs := map[string]any{}
	for i := range rapid.IntRange(1, 4).Draw(t, "jobs") {
		job := map[string]any{"env": env.Draw(t, "env"), "timeout": rapid.IntRange(1, 100).Draw(t, "timeout")}
		if i > 0 && rapid.Bool().Draw(t, "needs") {
			job["needs"] = []string{fmt.Sprintf("job%d", i-1)}
		}
		if rapid.Bool().Draw(t, "matrix") {
			job["matrix"] = map[string]any{
				"a": rapid.SliceOfNDistinct(scalar, 1, 3, func(v any) string { return fmt.Sprintf("%T%v", v, v) }).Draw(t, "a"),
				"b": []any{map[string]any{"x": scalar.Draw(t, "x"), "y": []any{nil, scalar.Draw(t, "y")}}},
			}
		}
		var steps []any
		for range rapid.IntRange(1, 3).Draw(t, "steps") {
			steps = append(steps, map[string]any{"run": "x" + rapid.String().Filter(isYAML).Draw(t, "run"), "env": env.Draw(t, "env"), "continue-on-error": rapid.Bool().Draw(t, "coe")})
		}
		job["steps"] = steps
		jobs[fmt.Sprintf("job%d", i)] = job
	}
	b, err := json.Marshal(map[string]any{"jobs": jobs})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// isYAML leaves out what JSON writes as it is and YAML does not allow, and
// expressions.
func isYAML(s string) bool {
	for _, r := range s {
		if r >= 0x7f && r < 0xa0 || r >= 0xfffe && r <= 0xffff || r == 0xfeff || r == '$' || r >= 0xd800 && r < 0xe000 || r == 0xfffd {
			return false
		}
	}
	return true
}
