package house

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// root is the module's directory as the tests see it.
const root = "../.."

func report(t *testing.T, bad []string) {
	t.Helper()
	for _, b := range bad {
		t.Error(b)
	}
}

// run executes the go command in the module; env entries come on top of the
// process's environment.
func run(t *testing.T, env []string, name string, args ...string) ([]byte, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Logf("%s %s: %v\n%s", name, strings.Join(args, " "), err, stderr.Bytes())
	}
	return out, err
}

// list loads the module's packages once.
func list(t *testing.T) map[string]Package {
	t.Helper()
	out, err := run(t, nil, "go", "list", "-e", "-json=ImportPath,Doc,Standard,Imports,Deps,CgoFiles,GoFiles", "./...")
	if err != nil {
		t.Fatal(err)
	}
	all, err := ParseList(bytes.NewReader(out))
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 5 {
		t.Fatalf("go list knows only %d packages", len(all))
	}
	m := map[string]Package{}
	for _, p := range all {
		m[strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, Module), "/")] = p
	}
	return m
}

// seams are the packages that an outsider imports for their interface alone.
var seams = []string{"queue", "blobstore", "vmprovider", "forge", "solstice/logstream", "solstice/workflow", "solstice/api/messages"}

// suites are the conformance suites by the area they test.
var suites = map[string]string{
	"queue/queuetest":                  "queue",
	"blobstore/blobstoretest":          "blobstore",
	"vmprovider/vmprovidertest":        "vmprovider",
	"forge/forgetest":                  "forge",
	"solstice/logstream/logstreamtest": "solstice/logstream",
}

// heavy is what a seam must not pull in.
var heavy = []string{
	"database/sql", "github.com/uptrace", "github.com/jackc", "modernc.org", "github.com/rabbitmq",
	"github.com/minio", "libvirt.org", "runtime/cgo", "C", Module + "/internal",
	Module + "/queue/sqlqueue", Module + "/queue/amqpqueue", Module + "/queue/memqueue",
	Module + "/blobstore/fsblob", Module + "/blobstore/s3blob", Module + "/blobstore/memblob",
	Module + "/vmprovider/processvm", Module + "/vmprovider/libvirtvm", Module + "/vmprovider/memvm", Module + "/vmprovider/remotevm",
	Module + "/forge/localgit", Module + "/forge/github", Module + "/forge/gitlab", Module + "/forge/forgejo",
	Module + "/forge/remoteforge",
	Module + "/solstice/logstream/filelog", Module + "/solstice/logstream/bloblog",
}

// generated are the packages that protoc writes.
var generated = regexp.MustCompile(`^solstice/api/\w+v\d+$`)

func TestEveryPackageIsDocumented(t *testing.T) {
	var ours []Package
	for name, p := range list(t) {
		if !generated.MatchString(name) {
			ours = append(ours, p)
		}
	}
	report(t, Undocumented(ours))
}

func TestSeamsPullInNoDriver(t *testing.T) {
	// runtime/cgo is a dependency of package net unless cgo is off.
	t.Setenv("CGO_ENABLED", "0")
	all := list(t)
	for _, s := range seams {
		p, ok := all[s]
		if !ok {
			t.Errorf("package %s does not exist", s)
		}
		report(t, BannedDeps(p, heavy))
	}
	client := "solstice/orchestrator/client"
	if _, ok := all[client]; !ok {
		t.Errorf("package %s does not exist", client)
	}
	report(t, BannedDeps(all[client], append([]string{Module + "/solstice/agent"}, heavy...)))
	for suite, area := range suites {
		p, ok := all[suite]
		if !ok {
			t.Errorf("conformance suite %s does not exist", suite)
		}
		report(t, BannedDeps(p, heavy))
		report(t, OnlyStdlibAnd(p, Module+"/"+area))
	}
}

func TestExamplesImportNothingInternal(t *testing.T) {
	found := false
	for name, p := range list(t) {
		if strings.HasPrefix(name, "examples/") {
			found = true
			report(t, InternalImports(p))
		}
	}
	if !found {
		t.Error("there are no examples")
	}
}

// environmentReaders are the packages that may use the environment: daemon
// parses it, testenv starts foreign servers.
var environmentReaders = []string{"solstice/daemon", "internal/testenv"}

func TestEnvironmentIsReadInOnePlace(t *testing.T) {
	bad, err := EnvironmentUse(os.DirFS(root), environmentReaders...)
	if err != nil {
		t.Fatal(err)
	}
	report(t, bad)
}

// TestNoModuleIsReplaced: except this one, in the modules that belong to it.
func TestNoModuleIsReplaced(t *testing.T) {
	for _, mod := range []struct{ dir, allowed string }{
		{dir: "."},
		{dir: "internal/bench", allowed: "replace " + Module + " => ../.."},
		{dir: "examples/qemuvm", allowed: "replace " + Module + " => ../.."},
		{dir: "examples/bareforge", allowed: "replace " + Module + " => ../.."},
	} {
		data, err := os.ReadFile(filepath.Join(root, mod.dir, "go.mod"))
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range Replaces(string(data)) {
			if mod.allowed == "" || !strings.HasSuffix(r, ": "+mod.allowed) {
				t.Errorf("%s: %s", mod.dir, r)
			}
		}
	}
}

// TestPeersStayOutside: what Solstice is compared with is no dependency of it.
func TestPeersStayOutside(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	for _, peer := range []string{"github.com/riverqueue/", "github.com/ThreeDotsLabs/"} {
		if strings.Contains(string(data), peer) {
			t.Errorf("go.mod names %s", peer)
		}
	}
}

// TestGuidesShowWhatIsThere: the code in the guides is taken from files that are
// compiled and tested.
func TestGuidesShowWhatIsThere(t *testing.T) {
	for name, patterns := range map[string][]string{
		"docs/writing-a-vm-provider.md": {
			"examples/qemuvm/*.go", "vmprovider/*.go", "vmprovider/vmprovidertest/*.go", "vmprovider/remotevm/*.go",
			"solstice/api/proto/solstice/provider/v1/*.proto",
		},
		"docs/writing-a-forge.md": {
			"examples/bareforge/*.go", "forge/*.go", "forge/forgetest/*.go", "forge/remoteforge/*.go",
			"solstice/api/proto/solstice/forge/v1/*.proto",
		},
	} {
		guide, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		var sources []string
		for _, pattern := range patterns {
			files, err := filepath.Glob(filepath.Join(root, pattern))
			if err != nil || len(files) == 0 {
				t.Fatalf("%s: %v, %v", pattern, files, err)
			}
			for _, file := range files {
				b, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				sources = append(sources, string(b))
			}
		}
		report(t, Invented(string(guide), []string{"go", "proto"}, sources))
	}
}

func TestNoPathsOfOneMachine(t *testing.T) {
	out, err := run(t, nil, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	if err != nil {
		t.Fatal("git knows no files here")
	}
	files := strings.FieldsFunc(string(out), func(r rune) bool { return r == 0 })
	files = slices.DeleteFunc(files, func(f string) bool {
		// Planted violations, and sums, which are random text.
		info, err := os.Stat(filepath.Join(root, f))
		return err != nil || !info.Mode().IsRegular() || filepath.Base(f) == "go.sum" || f == "internal/house/rules_test.go"
	})
	bad, err := MachinePaths(os.DirFS(root), files)
	if err != nil {
		t.Fatal(err)
	}
	report(t, bad)
}
