package main

import (
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/testenv" //nolint:depguard // the test is not part of the main that is copied
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
)

// TestMigrate goes up and down on both databases, from outside.
func TestMigrate(t *testing.T) {
	t.Parallel()
	testenv.Databases(t, func(t *testing.T, url string) {
		u := newUser(t, t.TempDir())
		u.env = []string{"DATABASE_URL=" + url}
		status := func(code int) []solstice.Migration {
			t.Helper()
			r := u.solstice("migrate", "status", "--json")
			r.want(t, code)
			return decoded[struct{ Migrations []solstice.Migration }](t, r.stdout).Migrations
		}
		all := status(1)
		n := len(all)
		if n == 0 || all[0].Applied {
			t.Fatalf("of an empty database: %+v", all)
		}
		first := all[0].Name
		u.ok("migrate", "init")
		status(1)
		if out := u.ok("migrate", "up"); strings.Count(out, "applied ") != n || !strings.HasPrefix(out, "applied "+first+"\n") {
			t.Errorf("up: %q", out)
		}
		if out := u.ok("migrate", "up"); out != "nothing applied\n" {
			t.Errorf("up again: %q", out)
		}
		for _, m := range status(0) {
			if !m.Applied || m.Group != 1 || m.AppliedAt.IsZero() {
				t.Errorf("%+v", m)
			}
		}
		has(t, "status", u.ok("migrate", "status"), "MIGRATION", first, "applied")

		insertToken := func() {
			t.Helper()
			db, err := storage.Database{DatabaseURL: url, DBPoolMaxSize: 2, DBPoolTimeoutMS: 30_000}.Open(t.Context(), "", slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = db.Close() }()
			if _, err := db.ExecContext(t.Context(), "INSERT INTO tokens (id, name, hash, role, created_at, expires_at, used_at) VALUES ('i', 'n', 'h', 'read', 1, 0, 0)"); err != nil {
				t.Fatalf("a row that refresh should have deleted is there: %v", err)
			}
		}
		insertToken()
		r := u.solstice("refresh")
		has(t, "stderr", r.stderr, "deletes everything", "--yes")
		r.want(t, 2)
		if out := u.ok("refresh", "--yes"); strings.Count(out, "reversed ") != n || strings.Count(out, "applied ") != n {
			t.Errorf("refresh: %q", out)
		}
		status(0)
		insertToken()

		if out := u.ok("migrate", "down"); strings.Count(out, "reversed ") != n || !strings.HasSuffix(out, "reversed "+first+"\n") {
			t.Errorf("down: %q", out)
		}
		if out := u.ok("migrate", "down"); out != "nothing reversed\n" {
			t.Errorf("down again: %q", out)
		}
		status(1)
	})
}

func TestMigrateRefuses(t *testing.T) {
	t.Parallel()
	s := serve(t)
	u := s.user(t.TempDir())
	for _, args := range [][]string{{"migrate", "up"}, {"migrate", "down"}, {"migrate", "init"}, {"refresh", "--yes"}} {
		r := u.solstice(args...)
		has(t, "stderr", r.stderr, "another orchestrator uses the state directory")
		r.want(t, 2)
	}
	has(t, "while it runs", u.ok("migrate", "status"), "applied")
	u.ok("pools") // nothing happened to it
	r := u.solstice("migrate", "status", "--database-url", "mysql://x")
	has(t, "stderr", r.stderr, "postgres://")
	r.want(t, 2)
}

func TestMigrateGenerate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	u := newUser(t, dir)
	r := u.solstice("migrate", "generate", "add_labels")
	has(t, "stderr", r.stderr, "no migrations in internal/store/migrations", "--dir")
	r.want(t, 2)
	write(t, dir, map[string]string{"internal/store/migrations/20200101000000_init.up.sql": ""})
	out := u.ok("migrate", "generate", "add_labels")
	names := strings.Fields(out)
	if len(names) != 2 || !regexp.MustCompile(`^internal/store/migrations/\d{14}_add_labels\.up\.sql$`).MatchString(names[0]) || names[1] != strings.Replace(names[0], ".up.", ".down.", 1) {
		t.Errorf("printed %q", out)
	}
	for _, n := range names {
		if !strings.HasPrefix(read(t, filepath.Join(dir, n)), "-- ") {
			t.Errorf("%s says nothing", n)
		}
	}
	for _, c := range []struct{ name, stderr string }{{"Add Labels", "small letters"}, {"../x", "small letters"}} {
		r := u.solstice("migrate", "generate", c.name)
		has(t, "stderr", r.stderr, c.stderr)
		r.want(t, 2)
	}
	write(t, dir, map[string]string{"internal/store/migrations/29990101000000_later.up.sql": ""})
	r = u.solstice("migrate", "generate", "late")
	has(t, "stderr", r.stderr, "29990101000000_later")
	r.want(t, 2)
}

func TestRunnerServe(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, map[string]string{"agent-linux-amd64": "an agent", "secret": "a secret"})
	u := newUser(t, dir)
	s := u.start("runner-serve", "--runner-dir", dir, "--runner-addr=127.0.0.1:0")
	s.says("agents are at http://")
	base := regexp.MustCompile(`http://\S+/runner`).FindString(s.output())
	get := func(path string) (int, string) {
		t.Helper()
		resp, err := http.Get(base + path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	if code, body := get("/linux/amd64"); code != 200 || body != "an agent" {
		t.Errorf("the agent: %d %q", code, body)
	}
	if code, body := get("/linux/amd64.sha256"); code != 200 || len(body) != 65 {
		t.Errorf("its sum: %d %q", code, body)
	}
	if code, _ := get("/secret"); code != 404 {
		t.Errorf("another file: %d", code)
	}
	r := u.solstice("runner-serve", "--runner-addr", strings.TrimSuffix(strings.TrimPrefix(base, "http://"), "/runner"))
	has(t, "stderr", r.stderr, "cannot listen at", "--runner-addr")
	r.want(t, 2)
	s.signal(syscall.SIGTERM)
	if code := s.end(); code != 0 {
		t.Errorf("after SIGTERM: exit status %d", code)
	}
}

// TestCompletion asks bash itself what it would offer.
func TestCompletion(t *testing.T) {
	t.Parallel()
	exe, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	u := newUser(t, t.TempDir())
	script := filepath.Join(u.dir, "solstice.bash")
	if err := os.WriteFile(script, []byte(u.ok("completion", "bash")), 0o600); err != nil {
		t.Fatal(err)
	}
	const ask = `set -u
source "$1"
complete -p solstice >/dev/null
COMP_WORDS=("${@:2}"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
_solstice
printf '%s\n' "${COMPREPLY[@]}"`
	for _, c := range []struct {
		line []string
		want []string
		also bool // more than that
	}{
		{[]string{""}, []string{"run", "enqueue", "status", "token", "completion"}, true},
		{[]string{"st"}, []string{"status"}, false},
		{[]string{"token", ""}, []string{"create", "list", "revoke"}, false},
		{[]string{"token", "create", "--ro"}, []string{"--role"}, false},
		{[]string{"token", "create", "x", "--role", "w"}, []string{"write"}, false},
		{[]string{"token", "create", "--role", "=", "w"}, []string{"write"}, false}, // as readline cuts --role=w
		{[]string{"completion", ""}, []string{"bash", "fish", "zsh"}, false},
		{[]string{"logs", "-f", "--fo"}, []string{"--follow"}, false},
		{[]string{"logs", "--server", "x", "--ra"}, []string{"--raw"}, false},
		{[]string{"enqueue", "--dir", ""}, []string{""}, false}, // the shell's own: files
		{[]string{"__"}, []string{""}, false},
	} {
		got := strings.Split(strings.TrimSuffix(shell(t, "bash", ask, append([]string{"bash", script, exe}, c.line...)...), "\n"), "\n")
		for _, w := range c.want {
			if !slices.Contains(got, w) {
				t.Errorf("%q offers %q, without %q", c.line, got, w)
			}
		}
		if !c.also && len(got) != len(c.want) {
			t.Errorf("%q offers %q, want %q", c.line, got, c.want)
		}
	}
	if out := u.ok("__complete", "--", "token", "create", "--role=w"); out != "--role=write\t\n" {
		t.Errorf("a value behind =: %q", out)
	}
	for _, sh := range []string{"zsh", "fish"} { // neither is asked of a machine
		has(t, sh, u.ok("completion", sh), "__complete")
	}
	r := u.solstice("completion", "tcsh")
	has(t, "stderr", r.stderr, "tcsh", "bash")
	r.want(t, 2)
}
