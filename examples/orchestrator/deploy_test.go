package main

import (
	"cmp"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"
	"go.yaml.in/yaml/v4"

	"github.com/solstice-ci/solstice-go/internal/testenv" //nolint:depguard // the test is not part of the main that is copied
)

// deploy has the files that these tests keep true.
const deploy = "../deploy"

// variables gives the program's, with their defaults.
func variables(t *testing.T) map[string]string {
	t.Helper()
	var f flags
	const program = "solstice-orchestrator"
	k, err := kong.New(&f, kong.Vars{"version": "", "program": program, "state_dir": ""})
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
	if len(out) < 40 || out["MIN_FREE_MB"] != "256" {
		t.Fatalf("the program's variables: %v", out)
	}
	return out
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(deploy, file))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// assignments are the lines NAME=value of a file, those behind a # too.
func assignments(text string) map[string]string {
	out := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^#?([A-Z][A-Z0-9_]*)=(.*)$`).FindAllStringSubmatch(text, -1) {
		out[m[1]] = m[2]
	}
	return out
}

// TestEveryVariableIsDocumented: orchestrator.env.example has all variables with
// their defaults, a comment above each, and nothing else.
func TestEveryVariableIsDocumented(t *testing.T) {
	text := read(t, "orchestrator.env.example")
	known, documented := variables(t), assignments(text)
	for name, value := range known {
		if got, ok := documented[name]; !ok {
			t.Errorf("%s is not documented", name)
		} else if got != value && strings.Contains(text, "\n#"+name+"=") {
			t.Errorf("the default of %s is %q, not %q", name, value, got)
		}
	}
	before := ""
	for line := range strings.Lines(text) {
		for name := range assignments(line) {
			if _, ok := known[name]; !ok {
				t.Errorf("the program does not know %s", name)
			}
			if !strings.HasPrefix(before, "# ") {
				t.Errorf("nothing says what %s is", name)
			}
		}
		before = line
	}
}

// compose is what the test looks at in compose.yaml.
type compose struct {
	Services map[string]struct {
		Image       string            `yaml:"image"`
		EnvFile     string            `yaml:"env_file"`
		Environment map[string]string `yaml:"environment"`
		Volumes     []string          `yaml:"volumes"`
		DependsOn   map[string]any    `yaml:"depends_on"`
		Build       struct {
			Context    string `yaml:"context"`
			Dockerfile string `yaml:"dockerfile"`
		} `yaml:"build"`
	} `yaml:"services"`
	Volumes map[string]any `yaml:"volumes"`
}

// TestComposeFile: what it names is there, and known to the program.
func TestComposeFile(t *testing.T) {
	text := read(t, "compose.yaml")
	var c compose
	if err := yaml.Unmarshal([]byte(text), &c); err != nil {
		t.Fatal(err)
	}
	readme, known := read(t, "README.md"), variables(t)
	present := func(file string) bool {
		_, err := os.Stat(filepath.Join(deploy, file))
		return err == nil
	}
	orchestrators := 0
	for name, s := range c.Services {
		if s.Image == "" {
			t.Errorf("%s has no image", name)
		}
		for other := range s.DependsOn {
			if _, ok := c.Services[other]; !ok {
				t.Errorf("%s depends on %s, which is not there", name, other)
			}
		}
		for _, v := range s.Volumes {
			from, _, _ := strings.Cut(v, ":")
			dir, isDir := strings.CutPrefix(from, "./")
			if _, ok := c.Volumes[from]; !ok && !isDir {
				t.Errorf("%s mounts the volume %s, which is not there", name, from)
			}
			if isDir && !strings.Contains(readme, dir) {
				t.Errorf("%s mounts %s, of which the README says nothing", name, from)
			}
		}
		if s.Build.Dockerfile != "" && !present(filepath.Join(s.Build.Context, s.Build.Dockerfile)) {
			t.Errorf("%s: there is no %s", name, s.Build.Dockerfile)
		}
		if !strings.HasPrefix(name, "orchestrator") {
			continue
		}
		orchestrators++
		if s.EnvFile == "" || !present(s.EnvFile+".example") || !strings.Contains(readme, s.EnvFile) {
			t.Errorf("%s: env_file %q has no example, or the README does not tell of it", name, s.EnvFile)
		}
		for v := range s.Environment {
			if _, ok := known[v]; !ok {
				t.Errorf("%s sets %s, which the program does not know", name, v)
			}
		}
	}
	if orchestrators < 2 {
		t.Errorf("%d orchestrators", orchestrators)
	}
	secrets := assignments(read(t, "compose.env.example"))
	for _, m := range regexp.MustCompile(`\$\{([A-Z0-9_]+)`).FindAllStringSubmatch(text, -1) {
		if _, ok := secrets[m[1]]; !ok {
			t.Errorf("compose.env.example lacks %s", m[1])
		}
		delete(known, m[1])
	}
	for name := range secrets {
		if !strings.Contains(text, "${"+name) {
			t.Errorf("compose.yaml does not use %s", name)
		}
	}
}

// TestSecretsStayOut: what README.md has people make is neither committed nor
// sent to the builder of the image, which could not read all of it.
func TestSecretsStayOut(t *testing.T) {
	dir := t.TempDir()
	if out, err := exec.Command("git", "init", "-q", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.WriteFile(filepath.Join(dir, ".gitignore"), []byte(read(t, ".gitignore")), 0o600); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]int{ // exit codes of git
		"compose.env": 0, "orchestrator.env": 0, "certificates/ca.key": 0, "repositories/r.git/HEAD": 0,
		"compose.env.example": 1, "compose.yaml": 1,
	} {
		git := exec.Command("git", "-C", dir, "check-ignore", "-q", file)
		if err := git.Run(); git.ProcessState.ExitCode() != want {
			t.Errorf("whether git ignores %s: %v, want exit status %d", file, err, want)
		}
	}
	if !strings.Contains(read(t, "Dockerfile.dockerignore"), "\nexamples/deploy\n") {
		t.Error("the directory with the secrets is part of what the image is built from")
	}
}

// TestUnits: systemd takes them, jobs outlive the service, and the variables in
// them are the program's.
func TestUnits(t *testing.T) {
	known := variables(t)
	units, err := filepath.Glob(filepath.Join(deploy, "*.service"))
	if err != nil || len(units) != 2 {
		t.Fatalf("units: %v, %v", units, err)
	}
	readme := read(t, "README.md")
	for _, unit := range units {
		name := filepath.Base(unit)
		text := read(t, name)
		for _, want := range []string{"\nKillMode=process\n", "\nEnvironmentFile=/etc/solstice/", "\nUser=solstice\n", "\nDelegate=yes\n"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s lacks %s", name, strings.TrimSpace(want))
			}
		}
		for _, harmful := range []string{
			"\nPrivateTmp=", "\nRuntimeDirectory=", "\nDynamicUser=", // go with the service
			"\nRestartPreventExitStatus=", // 2 is a panic's too
		} {
			if strings.Contains(text, harmful) {
				t.Errorf("%s has %s", name, strings.TrimSpace(harmful))
			}
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
		verify(t, unit)
	}
}

// verify has systemd look at a unit, with a program that is there.
func verify(t *testing.T, unit string) {
	t.Helper()
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Log("not looked at by systemd-analyze, which is not installed")
		return
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	text := regexp.MustCompile(`(?m)^ExecStart=\S+`).ReplaceAllLiteralString(string(b), "ExecStart="+exe)
	file := filepath.Join(t.TempDir(), strings.ReplaceAll(filepath.Base(unit), "@.", "@1."))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("systemd-analyze", "verify", "--man=no", file).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify %s: %v\n%s", filepath.Base(unit), err, out)
	}
}

// TestFleetCertificates: those that make-certificates makes serve two
// orchestrators on PostgreSQL.
func TestFleetCertificates(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		testenv.Missing(t, "openssl", err.Error())
	}
	dir := filepath.Join(t.TempDir(), "certificates")
	for range 2 { // the second time with the same authority
		if out, err := exec.Command(filepath.Join(deploy, "make-certificates"), dir, "orchestrator-1", "127.0.0.1").CombinedOutput(); err != nil {
			t.Fatalf("make-certificates: %v\n%s", err, out)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if secret := strings.HasSuffix(e.Name(), ".key"); secret && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", e.Name(), info.Mode())
		}
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o755 { // orchestrators are another user
		t.Errorf("the directory has mode %v, %v", info.Mode(), err)
	}
	if want := []string{"ca.key", "ca.pem", "ca.srl", "orchestrator.key", "orchestrator.pem"}; !slices.Equal(names, want) {
		t.Errorf("files %v, want %v", names, want)
	}
	file := func(name string) string { return filepath.Join(dir, name) }
	url := testenv.Postgres(t)
	var fleet []*process
	for _, name := range []string{"a", "b"} {
		fleet = append(fleet, start(t, filepath.Join(t.TempDir(), name), "--database-url", url, "--auto-migrate", "--mtls-role=write",
			"--blob-fs-root", filepath.Join(t.TempDir(), "blobs"),
			"--grpc-tls-cert", file("orchestrator.pem"), "--grpc-tls-key", file("orchestrator.key"), "--grpc-tls-ca", file("ca.pem"),
			"--agent-tls-cert", file("orchestrator.pem"), "--agent-tls-key", file("orchestrator.key"), "--agent-tls-ca", file("ca.pem")))
	}
	for _, o := range fleet {
		for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
			code, page := o.get("/readyz")
			if code == http.StatusOK {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("not ready: %s", page)
			}
		}
	}
}
