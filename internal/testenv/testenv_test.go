package testenv_test

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

func TestDatabasesAreFresh(t *testing.T) {
	seen := map[string]bool{}
	for range 2 {
		testenv.Databases(t, func(t *testing.T, url string) {
			if seen[url] {
				t.Fatalf("%s was handed out before", url)
			}
			seen[url] = true
			db, err := sqldb.Open(t.Context(), url, sqldb.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			if _, err := db.ExecContext(t.Context(), "CREATE TABLE t (x INTEGER)"); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestServerVerbs(t *testing.T) {
	s := testenv.StartPostgres(t)
	ctx := t.Context()
	db, err := sqldb.Open(ctx, s.Database(t), sqldb.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.ExecContext(ctx, "CREATE TABLE t AS SELECT 7 AS x"); err != nil {
		t.Fatal(err)
	}
	s.Kill(t)
	if err := db.PingContext(ctx); err == nil {
		t.Fatal("a killed server answers")
	}
	s.Start(t)
	s.Restart(t)
	s.Pause(t)
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	var x int
	if err := db.NewRaw("SELECT x FROM t").Scan(short, &x); err == nil {
		t.Fatal("a paused server answers")
	}
	s.Resume(t)
	if err := db.NewRaw("SELECT x FROM t").Scan(ctx, &x); err != nil || x != 7 {
		t.Fatalf("after all that: %d, %v", x, err)
	}
}

var hold = flag.Bool("hold", false, "internal: start a server, print its URL, wait")

// TestHold is the other half of TestServerEndsWithItsBinary.
func TestHold(t *testing.T) {
	if !*hold {
		return
	}
	fmt.Fprintln(os.Stdout, "\nurl", testenv.Postgres(t))
	select {}
}

func TestServerEndsWithItsBinary(t *testing.T) {
	testenv.Postgres(t) // skips where there is none
	cmd := exec.Command(os.Args[0], "-test.run=^TestHold$", "-hold")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	addr := ""
	for sc := bufio.NewScanner(out); addr == "" && sc.Scan(); {
		if raw, ok := strings.CutPrefix(sc.Text(), "url "); ok {
			u, err := url.Parse(raw)
			if err != nil {
				t.Fatal(err)
			}
			addr = u.Host
		}
	}
	if addr == "" {
		t.Fatal("the child said nothing")
	}
	if c, err := net.Dial("tcp", addr); err != nil {
		t.Fatal(err)
	} else {
		c.Close()
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for ; ; <-tick.C { // until go test's own timeout
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return // refused: the server did not outlive its binary
		}
		c.Close()
	}
}
