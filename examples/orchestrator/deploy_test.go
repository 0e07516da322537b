package main

import (
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/deploytest" //nolint:depguard // the test is not part of the main that is copied
	"github.com/solstice-ci/solstice-go/internal/testenv"    //nolint:depguard // the test is not part of the main that is copied
)

// deploy has the files that these tests keep true.
const deploy = deploytest.Dir

// variables gives the program's, with their defaults.
func variables(t *testing.T) map[string]string {
	t.Helper()
	out := deploytest.Variables(t, new(flags), "solstice-orchestrator")
	if len(out) < 40 || out["MIN_FREE_MB"] != "256" {
		t.Fatalf("the program's variables: %v", out)
	}
	return out
}

func read(t *testing.T, file string) string {
	t.Helper()
	return deploytest.Read(t, file)
}

// TestEveryVariableIsDocumented: orchestrator.env.example has all variables.
func TestEveryVariableIsDocumented(t *testing.T) {
	deploytest.Documented(t, "orchestrator.env.example", variables(t))
}

// TestComposeFile: what it names is there, and known to the program.
func TestComposeFile(t *testing.T) {
	text, c := read(t, "compose.yaml"), deploytest.ReadCompose(t)
	readme, known := read(t, "README.md"), variables(t)
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
		if s.Build.Dockerfile != "" {
			if _, err := os.Stat(filepath.Join(deploy, s.Build.Context, s.Build.Dockerfile)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if strings.HasPrefix(name, "orchestrator") {
			orchestrators++
			s.Known(t, name, known)
		}
	}
	if orchestrators < 2 {
		t.Errorf("%d orchestrators", orchestrators)
	}
	secrets := deploytest.Assignments(read(t, "compose.env.example"))
	for _, m := range regexp.MustCompile(`\$\{([A-Z0-9_]+)`).FindAllStringSubmatch(text, -1) {
		if _, ok := secrets[m[1]]; !ok {
			t.Errorf("compose.env.example lacks %s", m[1])
		}
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
		"compose.env": 0, "orchestrator.env": 0, "forge-integration.env": 0, "forges/forges.yaml": 0, "certificates/ca.key": 0, "repositories/r.git/HEAD": 0,
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

// TestUnits: systemd takes them, and jobs outlive the service.
func TestUnits(t *testing.T) {
	units, err := filepath.Glob(filepath.Join(deploy, "solstice-orchestrator*.service"))
	if err != nil || len(units) != 2 {
		t.Fatalf("units: %v, %v", units, err)
	}
	for _, unit := range units {
		name := filepath.Base(unit)
		text := read(t, name)
		for _, want := range []string{"\nKillMode=process\n", "\nDelegate=yes\n"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s lacks %s", name, strings.TrimSpace(want))
			}
		}
		for _, harmful := range []string{"\nPrivateTmp=", "\nRuntimeDirectory=", "\nDynamicUser="} { // go with the service
			if strings.Contains(text, harmful) {
				t.Errorf("%s has %s", name, strings.TrimSpace(harmful))
			}
		}
		deploytest.Unit(t, name, variables(t))
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
