package workflow_test

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

var update = flag.Bool("update", false, "write the golden files anew")

// files returns the workflow files below testdata/dir.
func files(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join("testdata", dir, "*.yaml"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no files in testdata/%s: %v", dir, err)
	}
	out := map[string][]byte{}
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		out[strings.TrimSuffix(filepath.Base(p), ".yaml")] = b
	}
	return out
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v (go test -update writes it)", err)
	}
	if got != string(want) {
		t.Errorf("%s differs; got:\n%s\nwant:\n%s", path, got, want)
	}
}

func TestBrokenFiles(t *testing.T) {
	all := files(t, "broken")
	if len(all) < 40 {
		t.Errorf("%d broken files, want at least 40", len(all))
	}
	for name, src := range all {
		t.Run(name, func(t *testing.T) {
			w, diags := workflow.Parse(workflow.File, src)
			if !diags.HasErrors() {
				t.Errorf("no error reported")
			}
			if w == nil {
				t.Fatal("no workflow")
			}
			if p, d := w.Plan(workflow.PlanOptions{}); p != nil || !d.HasErrors() {
				t.Error("a broken workflow was planned")
			}
			checkPositions(t, src, diags)
			golden(t, filepath.Join("testdata", "broken", name+".golden"), diags.String())
			if strings.HasPrefix(name, "inject-") || name == "many-at-once" || name == "positions" {
				b, err := json.MarshalIndent(diags, "", "  ")
				if err != nil {
					t.Fatal(err)
				}
				golden(t, filepath.Join("testdata", "broken", name+".json"), string(b)+"\n")
			}
		})
	}
}

// checkPositions: diagnostics are in order, inside the file, and say something.
func checkPositions(t *testing.T, src []byte, diags workflow.Diagnostics) {
	t.Helper()
	text := strings.ReplaceAll(strings.TrimPrefix(string(src), "\ufeff"), "\r\n", "\n")
	lines := strings.Split(strings.ReplaceAll(text, "\r", "\n"), "\n")
	for i, d := range diags {
		if d.Message == "" || d.Path == "" || d.Severity == "" {
			t.Errorf("incomplete diagnostic: %+v", d)
		}
		if d.Line < 1 || d.Line > len(lines) || d.Column < 1 || d.EndColumn <= d.Column {
			t.Errorf("position outside the file: %+v", d)
		} else if d.Column > len([]rune(lines[d.Line-1]))+1 {
			t.Errorf("column behind the line's end: %+v", d)
		}
		if i > 0 && (d.Line < diags[i-1].Line || d.Line == diags[i-1].Line && d.Column < diags[i-1].Column) {
			t.Errorf("out of order: %+v after %+v", d, diags[i-1])
		}
	}
}

// TestExpressionPositions: every diagnostic of positions.yaml points at the name
// it is about, in each kind of YAML scalar.
func TestExpressionPositions(t *testing.T) {
	_, diags := workflow.Parse(workflow.File, files(t, "broken")["positions"])
	if len(diags) != 11 {
		t.Errorf("%d diagnostics, want 11", len(diags))
	}
	for _, d := range diags {
		line := []rune(d.Source)
		name := string(line[d.Column-1 : min(d.EndColumn-1, len(line))])
		if !strings.HasPrefix(name, "nope") || !strings.Contains(d.Message, `"`+name+`"`) {
			t.Errorf("%d:%d points at %q: %s", d.Line, d.Column, name, d.Message)
		}
	}
}

func TestGoodFiles(t *testing.T) {
	for name, src := range files(t, "good") {
		t.Run(name, func(t *testing.T) {
			w, diags := workflow.Parse(workflow.File, src)
			if len(diags) > 0 {
				t.Fatalf("diagnostics:\n%s", diags)
			}
			plan, diags := w.Plan(workflow.PlanOptions{Contexts: workflow.Contexts{
				Event: workflow.Values{"title": "x"}, Ref: "refs/tags/v1", SHA: "0123abcd", Repo: "o/r",
			}})
			if diags.HasErrors() {
				t.Fatalf("plan:\n%s", diags)
			}
			b, err := json.MarshalIndent(plan, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, filepath.Join("testdata", "good", name+".json"), string(b)+"\n")
		})
	}
}
