// Package deploytest keeps the files of examples/deploy true to the programs that they
// deploy.
package deploytest

import (
	"cmp"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
	"go.yaml.in/yaml/v4"
)

// Dir has the files, seen from a directory of an example.
const Dir = "../deploy"

// Variables gives those of a program's flags, with their defaults.
func Variables(t testing.TB, flags any, program string) map[string]string {
	t.Helper()
	k, err := kong.New(flags, kong.Vars{"version": "", "program": program, "state_dir": ""})
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, group := range k.Model.AllFlags(false) {
		for _, flag := range group {
			for _, name := range flag.Envs {
				out[name] = flag.Default
			}
		}
	}
	return out
}

// Read reads a file of Dir.
func Read(t testing.TB, file string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(Dir, file))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Assignments are the lines NAME=value of a text, those behind a # too.
func Assignments(text string) map[string]string {
	out := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^#?([A-Z][A-Z0-9_]*)=(.*)$`).FindAllStringSubmatch(text, -1) {
		out[m[1]] = m[2]
	}
	return out
}

// Documented wants of a file all variables with their defaults, a comment above each, and
// nothing else.
func Documented(t testing.TB, file string, known map[string]string) {
	t.Helper()
	text := Read(t, file)
	documented := Assignments(text)
	for name, value := range known {
		if got, ok := documented[name]; !ok {
			t.Errorf("%s: %s is not documented", file, name)
		} else if got != value && strings.Contains(text, "\n#"+name+"=") {
			t.Errorf("%s: the default of %s is %q, not %q", file, name, value, got)
		}
	}
	before := ""
	for line := range strings.Lines(text) {
		for name := range Assignments(line) {
			if _, ok := known[name]; !ok {
				t.Errorf("%s: the program does not know %s", file, name)
			}
			if !strings.HasPrefix(before, "# ") {
				t.Errorf("%s: nothing says what %s is", file, name)
			}
		}
		before = line
	}
}

// Compose is what is looked at in compose.yaml.
type Compose struct {
	Services map[string]Service `yaml:"services"`
	Volumes  map[string]any     `yaml:"volumes"`
}

// Service is one of compose.yaml.
type Service struct {
	Image       string            `yaml:"image"`
	EnvFile     string            `yaml:"env_file"`
	Environment map[string]string `yaml:"environment"`
	Volumes     []string          `yaml:"volumes"`
	DependsOn   map[string]any    `yaml:"depends_on"`
	Entrypoint  []string          `yaml:"entrypoint"`
	Build       struct {
		Context    string `yaml:"context"`
		Dockerfile string `yaml:"dockerfile"`
	} `yaml:"build"`
}

// ReadCompose reads compose.yaml.
func ReadCompose(t testing.TB) (c Compose) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(Read(t, "compose.yaml")), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// Known wants the variables that a service sets to be its program's, and an example for
// those that are the operator's.
func (s Service) Known(t testing.TB, name string, known map[string]string) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(Dir, s.EnvFile+".example")); s.EnvFile == "" || err != nil || !strings.Contains(Read(t, "README.md"), s.EnvFile) {
		t.Errorf("%s: env_file %q has no example, or the README does not tell of it", name, s.EnvFile)
	}
	for v := range s.Environment {
		if _, ok := known[v]; !ok {
			t.Errorf("%s sets %s, which the program does not know", name, v)
		}
	}
}

// Unit wants of a unit that systemd takes it, that the variables in it are the program's,
// and that the README tells of its files.
func Unit(t testing.TB, name string, known map[string]string) {
	t.Helper()
	text, readme := Read(t, name), Read(t, "README.md")
	for _, want := range []string{"\nEnvironmentFile=/etc/solstice/", "\nUser=solstice\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("%s lacks %s", name, strings.TrimSpace(want))
		}
	}
	if strings.Contains(text, "\nRestartPreventExitStatus=") {
		t.Errorf("%s has RestartPreventExitStatus=: 2 is a panic's too", name)
	}
	for _, m := range regexp.MustCompile(`(?m)^Environment=([A-Z0-9_]+)=`).FindAllStringSubmatch(text, -1) {
		if _, ok := known[m[1]]; !ok {
			t.Errorf("%s sets %s, which the program does not know", name, m[1])
		}
	}
	for _, m := range regexp.MustCompile(`(?m)^EnvironmentFile=/etc/solstice/(\S+)$`).FindAllStringSubmatch(text, -1) {
		if !strings.Contains(readme, cmp.Or(strings.ReplaceAll(m[1], "%i", "1"), m[1])) {
			t.Errorf("the README does not tell of %s", m[1])
		}
	}
	verify(t, name, text)
}

// verify has systemd look at a unit, with a program that is there.
func verify(t testing.TB, name, text string) {
	t.Helper()
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Log("not looked at by systemd-analyze, which is not installed")
		return
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text = regexp.MustCompile(`(?m)^ExecStart=\S+`).ReplaceAllLiteralString(text, "ExecStart="+exe)
	file := filepath.Join(t.TempDir(), strings.ReplaceAll(name, "@.", "@1."))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("systemd-analyze", "verify", "--man=no", file).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify %s: %v\n%s", name, err, out)
	}
}
