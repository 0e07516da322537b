package workflow_test

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

func num(s string) json.Number { return json.Number(s) }

// TestMatrixAsOnGitHub is the example of GitHub's documentation of include, and
// what it says comes out.
func TestMatrixAsOnGitHub(t *testing.T) {
	w := mustParse(t, `
jobs:
  example:
    matrix:
      fruit: [apple, pear]
      animal: [cat, dog]
      include:
        - color: green
        - color: pink
          animal: cat
        - fruit: apple
          shape: circle
        - fruit: banana
        - fruit: banana
          animal: cat
    steps: [{run: x}]
`)
	want := []workflow.Values{
		{"fruit": "apple", "animal": "cat", "color": "pink", "shape": "circle"},
		{"fruit": "apple", "animal": "dog", "color": "green", "shape": "circle"},
		{"fruit": "pear", "animal": "cat", "color": "pink"},
		{"fruit": "pear", "animal": "dog", "color": "green"},
		{"fruit": "banana"},
		{"fruit": "banana", "animal": "cat"},
	}
	if got := w.Jobs[0].Matrix.Combinations(); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v\nwant %v", got, want)
	}
}

func TestMatrixIncludeOnly(t *testing.T) {
	w := mustParse(t, "jobs:\n  a:\n    matrix:\n      include:\n        - {go: 1.20, os: linux}\n        - {go: 1.26}\n    steps: [{run: x}]\n")
	p, diags := w.Plan(workflow.PlanOptions{})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	if got, want := jobNames(p), []string{"a (go 1.20, os linux)", "a (go 1.26)"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestMatrixNumbers: a number keeps its spelling, in names, in text, through
// JSON; and is a number in comparisons.
func TestMatrixNumbers(t *testing.T) {
	w := mustParse(t, "jobs:\n  a:\n    matrix:\n      v: [1.20, 1.0, 10, 0x1F, 1_000, 010, .5, 1e3, true, ~, '1.20']\n    steps: [{run: x}]\n")
	p, diags := w.Plan(workflow.PlanOptions{})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	want := []any{num("1.20"), num("1.0"), num("10"), "0x1F", "1_000", "010", ".5", num("1e3"), true, nil, "1.20"}
	spelled := []string{"1.20", "1.0", "10", "0x1F", "1_000", "010", ".5", "1e3", "true", "", "1.20"}
	for i, j := range p.Jobs {
		if !reflect.DeepEqual(j.Matrix["v"], want[i]) {
			t.Errorf("value %d: %#v, want %#v", i, j.Matrix["v"], want[i])
		}
		b, err := json.Marshal(j)
		if err != nil {
			t.Fatal(err)
		}
		var back workflow.PlannedJob
		if err := json.Unmarshal(b, &back); err != nil {
			t.Fatal(err)
		}
		cx := workflow.Contexts{Matrix: back.Matrix}
		got, err := cx.Interpolate("${{ matrix.v }}")
		if err != nil || got != spelled[i] {
			t.Errorf("value %d: %q, %v, want %q", i, got, err, spelled[i])
		}
		if _, ok := want[i].(json.Number); ok {
			if ok, err := cx.Condition("matrix.v >= 1.0 && matrix.v <= 1000.0"); err != nil || !ok {
				t.Errorf("value %d does not compare: %v, %v", i, ok, err)
			}
		}
	}
	if p.Jobs[0].Name != "a (v 1.20)" || p.Jobs[10].Name != "a (v 1.20) #2" {
		t.Errorf("names %q", jobNames(p))
	}
}

// TestMatrixModel compares the expansion with one that follows GitHub's
// description word by word.
func TestMatrixModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		keys := []string{"a", "b", "c"}[:rapid.IntRange(0, 3).Draw(t, "axes")]
		value := rapid.SampledFrom([]string{"x", "y", "z"})
		axes := map[string][]string{}
		var y strings.Builder
		y.WriteString("jobs:\n  j:\n    steps: [{run: x}]\n    matrix:\n")
		for _, k := range keys {
			axes[k] = rapid.SliceOfNDistinct(value, 1, 3, rapid.ID).Draw(t, k)
			fmt.Fprintf(&y, "      %s: [%s]\n", k, strings.Join(axes[k], ", "))
		}
		tuples := func(name string, from []string) []map[string]string {
			if len(from) == 0 {
				return nil
			}
			out := rapid.SliceOfN(rapid.MapOfN(rapid.SampledFrom(from), value, 1, len(from)), 0, 4).Draw(t, name)
			if len(out) > 0 {
				b, err := json.Marshal(out)
				if err != nil {
					t.Fatal(err)
				}
				fmt.Fprintf(&y, "      %s: %s\n", name, b)
			}
			return out
		}
		exclude := tuples("exclude", keys)
		include := tuples("include", []string{"a", "b", "c", "d", "e"})
		want := naiveExpansion(keys, axes, include, exclude)

		w, diags := workflow.Parse(workflow.File, []byte(y.String()))
		if len(want) == 0 {
			if !diags.HasErrors() {
				t.Fatalf("an empty matrix is accepted:\n%s", y.String())
			}
			return
		}
		if diags.HasErrors() {
			t.Fatalf("%s\n%s", y.String(), diags)
		}
		var got []string
		for _, c := range w.Jobs[0].Matrix.Combinations() {
			m := map[string]string{}
			for k, v := range c {
				m[k] = v.(string)
			}
			got = append(got, fmt.Sprint(m))
		}
		if !slices.Equal(got, want) {
			t.Fatalf("%s\ngot  %v\nwant %v", y.String(), got, want)
		}
	})
}

func naiveExpansion(keys []string, axes map[string][]string, include, exclude []map[string]string) []string {
	var original []map[string]string
	var expand func(i int, c map[string]string)
	expand = func(i int, c map[string]string) {
		if i < len(keys) {
			for _, v := range axes[keys[i]] {
				c[keys[i]] = v
				expand(i+1, c)
			}
			return
		}
		for _, e := range exclude {
			all := true
			for k, v := range e {
				all = all && c[k] == v
			}
			if all {
				return
			}
		}
		done := map[string]string{}
		for _, k := range keys {
			done[k] = c[k]
		}
		original = append(original, done)
	}
	if len(keys) > 0 {
		expand(0, map[string]string{})
	}
	added := make([]map[string]string, len(original))
	var own []map[string]string
	for _, inc := range include {
		used := false
		for i, o := range original {
			overwrites := false
			for k, v := range inc {
				if was, ok := o[k]; ok && was != v {
					overwrites = true
				}
			}
			if overwrites {
				continue
			}
			used = true
			if added[i] == nil {
				added[i] = map[string]string{}
			}
			for k, v := range inc {
				added[i][k] = v
			}
		}
		if !used {
			own = append(own, inc)
		}
	}
	var out []string
	for i, o := range original {
		for k, v := range added[i] {
			o[k] = v
		}
		out = append(out, fmt.Sprint(o))
	}
	for _, o := range own {
		out = append(out, fmt.Sprint(o))
	}
	return out
}
