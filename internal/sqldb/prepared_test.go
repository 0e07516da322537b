package sqldb

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/uptrace/bun"
)

func TestLift(t *testing.T) {
	for _, c := range []struct {
		query, text string
		args        []any
	}{
		{`SELECT "a1" FROM "t" WHERE id = 'a-1' AND n = 42`, `SELECT "a1" FROM "t" WHERE id = ? AND n = ?`, []any{"a-1", int64(42)}},
		{`SELECT a FROM t WHERE state IN ('queued', 'timed_out') AND hold = ''`, `SELECT a FROM t WHERE state IN ('queued', 'timed_out') AND hold = ''`, nil},
		{`INSERT INTO t VALUES ('it''s', X'00ff', -12, 1.5, 7, NULL, x'')`, `INSERT INTO t VALUES (?, ?, -?, 1.5, 7, NULL, ?)`, []any{"it's", []byte{0, 255}, int64(12), []byte{}}},
		{`UPDATE t SET a = '? "x" -- ;' WHERE b2 = 'ä' ORDER BY 1`, `UPDATE t SET a = ? WHERE b2 = ? ORDER BY 1`, []any{`? "x" -- ;`, "ä"}},
		{`SELECT "odd ""name' 12" FROM t LIMIT 50`, `SELECT "odd ""name' 12" FROM t LIMIT ?`, []any{int64(50)}},
		{`SELECT 99999999999999999999, 0x1f, 1e12`, `SELECT 99999999999999999999, 0x1f, 1e12`, nil},
	} {
		text, args, ok := lift(c.query)
		var values []any
		for i, a := range args {
			if a.Ordinal != i+1 {
				t.Errorf("%s: argument %d has ordinal %d", c.query, i+1, a.Ordinal)
			}
			values = append(values, a.Value)
		}
		if !ok || text != c.text || !reflect.DeepEqual(values, c.args) {
			t.Errorf("%s\n gives %s %#v, %v\n want  %s %#v", c.query, text, values, ok, c.text, c.args)
		}
	}
	for _, query := range []string{
		"", "CREATE TABLE t (a)", "PRAGMA data_version", "BEGIN", "EXPLAIN SELECT 10",
		"SELECT 10; SELECT 11", "SELECT 10 -- ten", "SELECT /* ten */ 10", "SELECT ?", "SELECT 'open", `SELECT "open`, "SELECT x'0'", "SELECT [a b]",
	} {
		if text, _, ok := lift(query); ok {
			t.Errorf("%s gives %s", query, text)
		}
	}
}

// FuzzLift: what is lifted from a string gives the string back.
func FuzzLift(f *testing.F) {
	for _, s := range []string{"", "queued", "it's", "a\x00b", "--", "?", "'';", "ä€"} {
		f.Add(s, int64(10))
	}
	f.Fuzz(func(t *testing.T, s string, n int64) {
		query := fmt.Sprintf("SELECT '%s', %d", strings.ReplaceAll(s, "'", "''"), n)
		text, args, ok := lift(query)
		if !ok {
			t.Fatalf("%q is not lifted", query)
		}
		if strings.Contains(text, "?") != (len(args) > 0) {
			t.Errorf("%q gives %q with %d arguments", query, text, len(args))
		}
		if strings.Trim(s, "abcdefghijklmnopqrstuvwxyz_") != "" && (len(args) == 0 || args[0].Value != s) {
			t.Errorf("%q gives %q %v", query, text, args)
		}
	})
}

// TestPrepared: kept statements give what fresh ones do, also while their rows
// are being read, after the schema changed, and when there are too many.
func TestPrepared(t *testing.T) {
	db, err := Open(t.Context(), "sqlite:"+t.TempDir()+"/db", Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	exec := func(db bun.IDB, query string) {
		t.Helper()
		if _, err := db.NewRaw(query).Exec(t.Context()); err != nil {
			t.Fatalf("%s: %v", query, err)
		}
	}
	count := func(db bun.IDB, where string) (n int) {
		t.Helper()
		if err := db.NewRaw("SELECT count(*) FROM t WHERE "+where).Scan(t.Context(), &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	exec(db, "CREATE TABLE t (id TEXT, n INTEGER, b BLOB)")
	for i := range 20 {
		exec(db, fmt.Sprintf("INSERT INTO t VALUES ('id-%d', %d, X'%02x')", i, 100+i, i))
	}
	if n := count(db, "n >= 110 AND typeof(n) = 'integer' AND typeof(id) = 'text' AND typeof(b) = 'blob'"); n != 10 {
		t.Errorf("%d rows, want 10", n)
	}
	tx, err := db.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	rows, err := tx.QueryContext(t.Context(), "SELECT id FROM t WHERE n < 105")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for seen := 0; ; seen++ {
		if !rows.Next() { // which closes them
			if seen != 5 || rows.Err() != nil {
				t.Errorf("%d rows, %v", seen, rows.Err())
			}
			break
		}
		var inner int // the same text, while the first is being read
		if err := tx.QueryRowContext(t.Context(), "SELECT id FROM t WHERE n < 101").Scan(new(string)); err != nil {
			t.Error(err)
		}
		if err := tx.QueryRowContext(t.Context(), "SELECT count(*) FROM t WHERE n < 103").Scan(&inner); err != nil || inner != 3 {
			t.Errorf("%d, %v", inner, err)
		}
	}
	exec(tx, "UPDATE t SET n = 999 WHERE id = 'id-7'")
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	exec(db, "ALTER TABLE t ADD COLUMN more TEXT")
	if n := count(db, "n >= 110 AND typeof(n) = 'integer' AND typeof(id) = 'text' AND typeof(b) = 'blob'"); n != 10 {
		t.Errorf("%d rows after the schema changed, want 10", n)
	}
	for i := range 3 * maxPrepared {
		if n := count(db, fmt.Sprintf("n = 107 AND more IS NULL AND '%s' <> ''", strings.Repeat("a", i+1))); n != 1 {
			t.Fatalf("%d rows, want 1", n)
		}
	}
}
