package workflow_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

func contexts() workflow.Contexts {
	return workflow.Contexts{
		Event: workflow.Values{
			"number": json.Number("12345678901"), "title": "a \"b\" <c>", "draft": false, "none": nil,
			"labels": []any{"x", json.Number("1.10")}, "head": map[string]any{"ref": "topic", "n": json.Number("2.50")},
		},
		Inputs: workflow.Values{"level": "full", "dry-run": true, "count": json.Number("1.50")},
		Matrix: workflow.Values{"go": json.Number("1.20"), "os": "linux", "n": json.Number("3"), "cfg": map[string]any{"v": json.Number("1.0")}},
		Ref:    "refs/heads/main", SHA: "0123abcd", Repo: "octo/cat",
		Needs: map[string]workflow.Need{"build": {Result: "success", Outputs: map[string]string{"v": "1.2"}}, "build-bsd": {Result: "failure"}},
		Steps: map[string]workflow.StepState{"s": {Outcome: "failure", Conclusion: "success", Outputs: map[string]string{"o": "1"}}},
		Env:   map[string]string{"A": "a"},
	}
}

func TestInterpolate(t *testing.T) {
	for in, want := range map[string]string{
		"":                                                "",
		"plain $HOME {{ x }} }}":                          "plain $HOME {{ x }} }}",
		"${{ sha }}":                                      "0123abcd",
		"a${{sha}}b${{ repo }}c":                          "a0123abcdbocto/catc",
		"${{ matrix.go }}":                                "1.20",
		"${{ matrix['go'] }}":                             "1.20",
		"${{ 'go' + string(matrix.go) }}":                 "go1.20",
		"${{ string(matrix.cfg.v) }}":                     "1.0",
		"${{ string(matrix.none) }}":                      "",
		"${{ string(sha) }}":                              "0123abcd",
		"${{ matrix.cfg.v }}":                             "1.0",
		"${{ matrix.cfg }}":                               `{"v":1.0}`,
		"${{ matrix.n + 1 }}":                             "4",
		"${{ matrix.missing }}":                           "",
		"${{ matrix.go < 1.21 }}":                         "true",
		"${{ matrix.n == 3 && true }}":                    "true",
		"${{ inputs.count }}":                             "1.50",
		"${{ inputs['dry-run'] }}":                        "true",
		"${{ inputs.`dry-run` }}":                         "true",
		"${{ event.number }}":                             "12345678901",
		"${{ event.number + 1 }}":                         "12345678902",
		"${{ event.title }}":                              `a "b" <c>`,
		"${{ event.none }}":                               "",
		"${{ event.labels }}":                             `["x",1.10]`,
		"${{ event.head }}":                               `{"n":2.50,"ref":"topic"}`,
		"${{ event.labels[0] }}":                          "x",
		"${{ event.labels.map(l, l) }}":                   `["x",1.1]`,
		"${{ {'a': {'b': 1}} }}":                          `{"a":{"b":1}}`,
		"${{ [1, 2.0, 2.5, true, null] }}":                `[1,2,2.5,true,null]`,
		"${{ '}}' }}":                                     "}}",
		"${{ '${{' }} ${{ r'\\' + \"}}\" }}":              `${{ \}}`,
		`${{ '\'}}' }}`:                                   "'}}",
		"${{ '''it's }}''' }}":                            "it's }}",
		"${{ 1.5 * 2.0 }}":                                "3",
		"${{ 1e21 }}":                                     "1e+21",
		"${{ 0.1 }}":                                      "0.1",
		"${{ needs.build.outputs.v }}":                    "1.2",
		"${{ needs.build.outputs.none }}":                 "",
		"${{ needs['build-bsd'].result }}":                "failure",
		"${{ needs['build-bsd'].outputs.x}}":              "",
		"${{ steps.s.outcome }}":                          "failure",
		"${{ steps.s.outputs.o }}":                        "1",
		"${{ steps.later.outcome }}":                      "skipped",
		"${{ steps.later.outputs.x }}":                    "",
		"${{ env.A }}${{ env.B }}":                        "a",
		"${{ has(env.A) }} ${{ has(env.B) }}":             "true false",
		"${{ has(event.head.ref) }}":                      "true",
		"${{ has(event.nope) ? event.nope : 'x' }}":       "x",
		"${{ ref.replace('refs/heads/', '') }}":           "main",
		"${{ ref.startsWith('refs/heads/') ? 'b' : 't'}}": "b",
		"${{ repo.split('/')[1].upperAscii() }}":          "CAT",
		"${{ duration('90m') }}":                          "1h30m0s",
		"${{\n  sha\n}}":                                  "0123abcd",
		"日本 ${{ '語' }}":                                   "日本 語",
	} {
		got, err := contexts().Interpolate(in)
		if err != nil || got != want {
			t.Errorf("%s\n got %q, %v\nwant %q", in, got, err, want)
		}
	}
}

func TestInterpolateErrors(t *testing.T) {
	long := "[" + strings.Repeat("'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx',", 100) + "'x']"
	for in, want := range map[string]string{
		"${{ sha":                            "not closed",
		"${{ 'sha }}":                        "not closed",
		"${{ }}":                             "empty",
		"${{ nope }}":                        "there is no 'nope'",
		"${{ sha + 1 }}":                     "does not work with",
		"${{ event.nope.x }}":                `there is no "nope"`,
		"${{ needs.other }}":                 `there is no "other"`,
		"${{ 1 +  }}":                        "incomplete",
		"${{ matrix.os + 1 }}":               "no such overload",
		"${{ 1 / 0 }}":                       "division by zero",
		"${{ @status }}":                     "unexpected",
		"${{ status@ }}":                     "unexpected",
		"${{ 1.0 / 0.0 }}${{ [0.0 / 0.0] }}": "no JSON form",
		"${{ " + strings.Repeat("(", 60) + "1" + strings.Repeat(")", 60) + " }}": "",
		"${{ '" + strings.Repeat("x", 5000) + "' }}":                             "",
		"${{ " + long + ".map(a, " + long + ".map(b, a + b)).size() }}":          "",
		"${{ ['a','b','c','d','e','f','g','h'].map(a, ['a','b','c','d','e','f','g','h'].map(b, ['a','b','c','d','e','f','g','h'].map(c, ['a','b','c','d','e','f','g','h'].map(d, ['a','b','c','d','e','f','g','h'].map(e, ['a','b','c','d','e','f','g','h'].map(f, a+b+c+d+e+f)))))).size() }}": "cost limit",
	} {
		got, err := contexts().Interpolate(in)
		if !errors.Is(err, workflow.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s\n got %.80q, %v\nwant an error with %q", in, got, err, want)
		}
		if err != nil && len(err.Error()) > 1000 {
			t.Errorf("%.80s: an error of %d bytes", in, len(err.Error()))
		}
	}
	big := workflow.Contexts{Event: workflow.Values{"x": strings.Repeat("x", 1<<19)}}
	if _, err := big.Interpolate("${{ event.x }}${{ event.x }}${{ event.x }}"); !errors.Is(err, workflow.ErrInvalid) {
		t.Errorf("an oversize result: %v", err)
	}
}

func TestInterpolateEmptyContexts(t *testing.T) {
	for in, want := range map[string]string{
		"[${{ ref }}${{ sha }}${{ repo }}${{ env.X }}${{ matrix.x }}]": "[]",
		"${{ needs }}${{ event }}${{ inputs }}":                        "{}{}{}",
		"${{ steps.x.conclusion }}":                                    "skipped",
	} {
		if got, err := (workflow.Contexts{}).Interpolate(in); err != nil || got != want {
			t.Errorf("%s: got %q, %v, want %q", in, got, err, want)
		}
	}
}

func TestCondition(t *testing.T) {
	const ok, failed, stopped = workflow.StatusSuccess, workflow.StatusFailure, workflow.StatusCancelled
	for _, c := range []struct {
		expr, status string
		want         bool
	}{
		{"", "", true},
		{"", ok, true},
		{"", failed, false},
		{"", stopped, false},
		{"  ", failed, false},
		{"true", ok, true},
		{"true", failed, false},
		{"false", ok, false},
		{"${{ true }}", ok, true},
		{" ${{ sha == '0123abcd' }} ", ok, true},
		{"sha == '${{'", ok, false},
		{"success()", ok, true},
		{"success()", failed, false},
		{"failure()", failed, true},
		{"failure()", ok, false},
		{"failure()", stopped, false},
		{"cancelled()", stopped, true},
		{"cancelled()", failed, false},
		{"always()", failed, true},
		{"always()", stopped, true},
		{"always() && false", failed, false},
		{"failure() || sha == 'x'", failed, true},
		{"[1].exists(x, failure())", failed, true},
		{"!cancelled()", failed, true},
		{"needs.build.result == 'success'", failed, false},
		{"always() && needs.build.result == 'success'", failed, true},
		{"steps.s.outcome == 'failure'", ok, true},
		{"matrix.go == 1.2 && matrix.n >= 3 && matrix.n < 3.5", ok, true},
		{"matrix.missing == true", ok, false},
		{"inputs['dry-run'] && inputs.level in ['full', 'quick']", ok, true},
		{"event.head.ref.matches('^to')", ok, true},
		{"1 / 0 == 1", failed, false}, // not evaluated
	} {
		cx := contexts()
		cx.Status = c.status
		if got, err := cx.Condition(c.expr); err != nil || got != c.want {
			t.Errorf("%q with status %q: %v, %v", c.expr, c.status, got, err)
		}
	}
	for expr, want := range map[string]string{
		"sha":               "of type string",
		"matrix.n":          "of type int",
		"${{ sha }} == 'x'": "mixes",
		"${{ sha":           "not closed",
		"ref = 'x'":         "unexpected",
		"succes()":          "no 'succes'",
	} {
		if got, err := contexts().Condition(expr); got || !errors.Is(err, workflow.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v, want an error with %q", expr, got, err, want)
		}
	}
}

func TestInterpolateEnv(t *testing.T) {
	cx := contexts()
	got, err := cx.InterpolateEnv([]workflow.KV{{"X", "${{ env.A }}1"}, {"Y", "${{ env.X }}2"}, {"A", "new"}, {"Z", "${{ env.A }}"}})
	want := []workflow.KV{{"X", "a1"}, {"Y", "a12"}, {"A", "new"}, {"Z", "new"}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	if !reflect.DeepEqual(cx.Env, map[string]string{"A": "a"}) {
		t.Errorf("the caller's env changed: %v", cx.Env)
	}
	if _, err := cx.InterpolateEnv([]workflow.KV{{"BAD", "${{ nope }}"}}); !errors.Is(err, workflow.ErrInvalid) || !strings.Contains(err.Error(), "BAD") {
		t.Errorf("a bad value: %v", err)
	}
	if got, err := (workflow.Contexts{}).InterpolateEnv([]workflow.KV{{"X", "1"}}); err != nil || len(got) != 1 {
		t.Errorf("without env: %v, %v", got, err)
	}
}

func TestContextsRoundTrip(t *testing.T) {
	in := contexts()
	in.Status = workflow.StatusFailure
	b, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	var out workflow.Contexts
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(in, out) {
		t.Errorf("got %+v, want %+v", out, in)
	}
	if got, err := out.Interpolate("${{ matrix.go }}"); err != nil || got != "1.20" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestManyExpressions: more programs than the cache holds, from many goroutines.
func TestManyExpressions(t *testing.T) {
	const workers, each = 4, 600
	var wg sync.WaitGroup
	defer wg.Wait()
	for w := range workers {
		wg.Go(func() {
			cx := workflow.Contexts{SHA: fmt.Sprint(w)}
			for i := range each {
				got, err := cx.Interpolate(fmt.Sprintf("${{ sha + '-%d' }}", i))
				if want := fmt.Sprintf("%d-%d", w, i); err != nil || got != want {
					t.Errorf("got %q, %v, want %q", got, err, want)
					return
				}
			}
		})
	}
}

func BenchmarkInterpolate(b *testing.B) {
	cx := contexts()
	for b.Loop() {
		if _, err := cx.Interpolate("go${{ matrix.go }} on ${{ matrix.os + '-' + sha }}"); err != nil {
			b.Fatal(err)
		}
	}
}
