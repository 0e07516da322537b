package store

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// upTo gives schemas of the first one, two, … of this program's migrations.
func upTo(t *testing.T, db *bun.DB) []*schema {
	t.Helper()
	ups, err := fs.Glob(embedded, "migrations/*.up.sql")
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(ups)
	var out []*schema
	files := fstest.MapFS{}
	for _, up := range ups {
		for _, name := range []string{up, strings.TrimSuffix(up, ".up.sql") + ".down.sql"} {
			b, err := fs.ReadFile(embedded, name)
			if err != nil {
				t.Fatal(err)
			}
			files[name] = &fstest.MapFile{Data: b}
		}
		s, err := newSchema(db, maps.Clone(files))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, s)
	}
	return out
}

func column[T any](t *testing.T, db *bun.DB, query string, args ...any) []T {
	t.Helper()
	var out []T
	if err := db.NewRaw(query, args...).Scan(t.Context(), &out); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return out
}

// columns are those of each table, in order, with their types.
func columns(t *testing.T, db *bun.DB) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	query := `SELECT name || ' ' || type || CASE "notnull" WHEN 0 THEN '' ELSE ' NOT NULL' END || ' ' || coalesce(dflt_value, '') FROM pragma_table_info(?)`
	if sqldb.IsPostgres(db) {
		query = `SELECT column_name || ' ' || data_type || CASE is_nullable WHEN 'YES' THEN '' ELSE ' NOT NULL' END || ' ' || coalesce(column_default, '')
			FROM information_schema.columns WHERE table_schema = 'public' AND table_name = ? ORDER BY ordinal_position`
	}
	for _, table := range tables(t, db) {
		if cols := column[string](t, db, query, table); len(cols) > 0 && !isIndex(t, db, table) {
			out[table] = cols
		}
	}
	return out
}

// isIndex: PostgreSQL lists indexes and sequences among its relations.
func isIndex(t *testing.T, db *bun.DB, name string) bool {
	t.Helper()
	return sqldb.IsPostgres(db) && column[string](t, db, "SELECT relkind::text FROM pg_class WHERE oid = to_regclass(?)", name)[0] != "r"
}

func describe(t *testing.T, db *bun.DB) string {
	t.Helper()
	indexes := "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL AND tbl_name NOT LIKE 'solstice_migrations%' ORDER BY name"
	if sqldb.IsPostgres(db) {
		indexes = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename NOT LIKE 'solstice_migrations%' ORDER BY indexname"
	}
	var b strings.Builder
	all := columns(t, db)
	for _, table := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintf(&b, "%s:\n\t%s\n", table, strings.Join(all[table], "\n\t"))
	}
	return b.String() + strings.Join(column[string](t, db, indexes), "\n")
}

// content is a digest of what these columns hold, by table, but for who is there,
// which is said again within seconds.
func content(t *testing.T, db *bun.DB, of map[string][]string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for table, cols := range of {
		if table == "orchestrators" {
			continue
		}
		var texts []string
		for _, c := range cols {
			name, _, _ := strings.Cut(c, " ")
			texts = append(texts, `coalesce(CAST("`+name+`" AS TEXT), '~')`)
		}
		rows := column[string](t, db, "SELECT "+strings.Join(texts, " || '|' || ")+" FROM "+table+" ORDER BY 1")
		out[table] = fmt.Sprintf("%d rows, %x", len(rows), sha256.Sum256([]byte(strings.Join(rows, "\n"))))
	}
	return out
}

// TestEveryStep goes up by one migration at a time, back by one at a time with
// data, and up again: what each makes is gone after its reversal and nothing
// else is, and what older tables and columns hold stays.
func TestEveryStep(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		ctx := t.Context()
		db := openDB(t, url)
		steps := upTo(t, db)
		looks, cols := []string{""}, []map[string][]string{{}} // by how many are applied
		up := func(s *schema) {
			t.Helper()
			if done, err := s.up(ctx); err != nil || len(done) != 1 {
				t.Fatalf("up: %v, %v", done, err)
			}
		}
		for _, s := range steps {
			up(s)
			looks, cols = append(looks, describe(t, db)), append(cols, columns(t, db))
		}
		fillSome(t, db)
		all := content(t, db, cols[len(steps)])
		for table, what := range all {
			if strings.HasPrefix(what, "0 rows") {
				t.Errorf("the test has nothing in table %s", table)
			}
		}
		for n := len(steps) - 1; n >= 0; n-- {
			before := content(t, db, cols[n])
			name := steps[n].names[n]
			if done, err := steps[n].down(ctx, false); err != nil || fmt.Sprint(done) != "["+name+"]" {
				t.Fatalf("down: %v, %v; want %s", done, err, name)
			}
			if got := describe(t, db); got != looks[n] {
				t.Errorf("after reversing %s:\n%s\nbefore it was applied:\n%s", name, got, looks[n])
			}
			if after := content(t, db, cols[n]); !maps.Equal(before, after) {
				t.Errorf("reversing %s changed what is older:\n%v\n%v", name, before, after)
			}
			if n == 0 {
				continue
			}
			up(steps[n]) // as whoever reconsiders does
			if got := describe(t, db); got != looks[n+1] {
				t.Errorf("%s, again:\n%s\nthe first time:\n%s", name, got, looks[n+1])
			}
			if after := content(t, db, cols[n]); !maps.Equal(before, after) {
				t.Errorf("%s, again, changed what is older:\n%v\n%v", name, before, after)
			}
			if _, err := steps[n].down(ctx, false); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// fillSome puts something into every table.
func fillSome(t *testing.T, db *bun.DB) {
	t.Helper()
	for _, row := range []any{
		&Run{ID: "r", State: RunQueued, Forge: "f", RepoKey: "f/a", Commit: "c", Repo: []byte(`{"name":"a"}`), Retention: "logs_gone", Head: "h", Note: "n", Concurrency: "g", FinishedAt: 5},
		&Job{ID: "j", RunID: "r", State: JobQueued, Label: "l", RepoKey: "f/a", Spec: []byte("{}"), CopiedFrom: "x"},
		&Attempt{ID: "t", JobID: "j", RunID: "r", State: AttemptFinished, LogStream: "s"},
		&Step{AttemptID: "t", Name: "s", Outputs: []byte(`{"a":"b"}`)},
		&Machine{ID: "m", Host: "h", Pool: "p", State: MachineGone, TokenHash: "th", Recipe: "x", GoneAt: 7},
		&Orchestrator{ID: "o", Pools: []byte("[]"), Contacts: []byte("[]")},
		&Delivery{ID: "d", Forge: "f", State: DeliveryAccepted, Headers: []byte("{}"), Event: []byte("{}"), Body: []byte("\x00\xff")},
		&Report{Forge: "f", RepoName: "a", Commit: "c", Key: "k", Repo: []byte("{}"), Status: []byte("{}"), Version: 1},
		&Watched{Forge: "f", Name: "a", Repo: []byte("{}"), RepoID: "7", WantedAt: 1, HeadsAt: 2, PullsAt: 3, PullsFrom: 4, NextAt: 5},
		&Head{Forge: "f", Repo: "a", Ref: "refs/heads/main", Commit: "c", Told: []string{"b"}, Found: []Finding{{Commit: "c", Delivery: "d", At: 1}}, Version: 1},
		&OutboxMessage{Key: "k", Topic: "t", ContentType: "c", Body: []byte("\x00\xff body"), Attributes: []byte("{}")},
	} {
		if _, err := db.NewInsert().Model(row).Exec(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, q := range []string{
		"INSERT INTO capacity VALUES ('h')", "INSERT INTO warm_failures VALUES ('h', 'p', 1, 2, 3, 'r')", "INSERT INTO leases VALUES ('n', 'o', 1)",
		"INSERT INTO log_streams VALUES ('s', 1, 2, true, 'h')", "INSERT INTO log_entries VALUES ('s', 0, 1, 2, 'k', 'h', false)",
		"INSERT INTO tokens VALUES ('i', 'n', 'h', 'read', 1, 2, 3)",
	} {
		if _, err := db.ExecContext(t.Context(), q); err != nil {
			t.Fatalf("%s: %v", q, err)
		}
	}
}

// MigrateArg makes the test binary a process that migrates, see TestMain.
const MigrateArg = "__migrate"

// TestProcessesMigrateAtOnce: of an empty database, and of an older one with
// something in it.
func TestProcessesMigrateAtOnce(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		db := openDB(t, url)
		steps := upTo(t, db)
		newest := steps[len(steps)-1]
		last, older := newest.names[len(steps)-1], newest.names[len(steps)-2]
		ids := migrateAtOnce(t, url, 3)
		look := describe(t, db)
		fillSome(t, db)
		for range 2 {
			if _, err := newest.each(t.Context(), []string{last}, true, 0); err != nil {
				t.Fatal(err)
			}
			old := columns(t, db)
			before := content(t, db, old)
			if again := migrateAtOnce(t, url, 3); !maps.Equal(ids, again) || len(ids) != 1 {
				t.Errorf("installations %v, then %v", ids, again)
			}
			if got := describe(t, db); got != look {
				t.Errorf("schema:\n%s\nwant:\n%s", got, look)
			}
			if n := column[int](t, db, "SELECT count(*) FROM "+migrationTable)[0]; n != len(steps) {
				t.Errorf("%d migrations are recorded, want %d", n, len(steps))
			}
			if after := content(t, db, old); !maps.Equal(before, after) {
				t.Errorf("content:\n%v\nwas:\n%v", after, before)
			}
			path, isFile := strings.CutPrefix(url, "sqlite:")
			if !isFile {
				continue
			}
			if err := newest.backup(t.Context(), older); err != nil { // by one that looked before the others migrated
				t.Error(err)
			}
			if has, err := SchemaOf(t.Context(), openDB(t, "sqlite:"+path+"."+older+".bak")); err != nil || has != older {
				t.Errorf("the copy of the older file has the schema %s, %v", has, err)
			}
			if left, err := filepath.Glob(path + "*.tmp*"); err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		}
	})
}

// migrateAtOnce has n processes migrate, and returns the installations they saw.
func migrateAtOnce(t *testing.T, url string, n int) map[string]bool {
	t.Helper()
	type process struct {
		cmd   *exec.Cmd
		stdin io.Closer
		lines *bufio.Scanner
	}
	var all []process
	for range n {
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(exe, MigrateArg, url)
		cmd.Stderr = os.Stderr
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		all = append(all, process{cmd, stdin, bufio.NewScanner(stdout)})
	}
	ids := map[string]bool{}
	for _, p := range all {
		p.lines.Scan()
	}
	for _, p := range all {
		_ = p.stdin.Close() // it starts
	}
	for _, p := range all {
		for p.lines.Scan() {
			ids[p.lines.Text()] = true
		}
		if err := p.cmd.Wait(); err != nil {
			t.Errorf("a process that migrates: %v", err)
		}
	}
	return ids
}
