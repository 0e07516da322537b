package testenv_test

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
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

var hold = flag.Bool("hold", false, "internal: start servers, print their URLs, wait")

// TestHold is the other half of TestServersEndWithTheirBinary.
func TestHold(t *testing.T) {
	if !*hold {
		return
	}
	fmt.Fprintln(os.Stdout, "\nurl", testenv.Postgres(t))
	fmt.Fprintln(os.Stdout, "url", testenv.StartRabbitMQ(t, testenv.RabbitMQOptions{}).URL(""))
	fmt.Fprintln(os.Stdout, "url", testenv.StartS3(t).URL())
	select {}
}

func TestServersEndWithTheirBinary(t *testing.T) {
	testenv.Postgres(t) // skips where one of them is missing
	testenv.RabbitMQ(t)
	testenv.S3(t)
	cmd := exec.Command(os.Args[0], "-test.run=^TestHold$", "-hold")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var addrs []string
	for sc := bufio.NewScanner(out); len(addrs) < 3 && sc.Scan(); {
		if raw, ok := strings.CutPrefix(sc.Text(), "url "); ok {
			u, err := url.Parse(raw)
			if err != nil {
				t.Fatal(err)
			}
			addrs = append(addrs, u.Host)
		}
	}
	if len(addrs) != 3 {
		t.Fatalf("the child said only %v", addrs)
	}
	for _, addr := range addrs {
		if !listens(addr) {
			t.Errorf("nobody listens at %s", addr)
		}
	}
	servers := below(t, cmd.Process.Pid)
	if len(servers) < 6 { // keepers, postmaster, broker with its script and epmd, S3 server
		t.Errorf("the child started only %v", servers)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for _, addr := range addrs { // until go test's own timeout
		for listens(addr) {
			<-tick.C
		}
	}
	for _, pid := range servers {
		for exists(pid) {
			<-tick.C
		}
	}
}

// TestSharedServerEndsWithItsUsers: two binaries use one server, which outlives
// the one that started it and ends with the other.
func TestSharedServerEndsWithItsUsers(t *testing.T) {
	testenv.S3(t) // skips where it is missing
	// A directory of their own, so that this binary is none of the users. They
	// inherit a descriptor through which whoever has it is one, as from
	// .mise/tasks/test/all.
	tmp := t.TempDir()
	shared := filepath.Join(tmp, filepath.Base(testenv.SharedDir()))
	for _, dir := range []string{shared, filepath.Join(shared, "s3")} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	users, err := os.Create(filepath.Join(shared, "s3", "users"))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(users.Fd()), syscall.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	inherited := []*os.File{users}
	user := func() (*exec.Cmd, string) {
		cmd := exec.Command(os.Args[0], "-test.run=^TestUse$", "-use")
		cmd.Env = []string{"TMPDIR=" + tmp, "HOME=" + home(t), "PATH=/usr/bin:/bin"}
		cmd.ExtraFiles = inherited
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for sc := bufio.NewScanner(out); sc.Scan(); {
			if raw, ok := strings.CutPrefix(sc.Text(), "url http://"); ok {
				return cmd, raw
			}
		}
		t.Fatal("the child said nothing")
		return nil, ""
	}
	end := func(cmd *exec.Cmd) {
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
	}
	first, addr := user()
	second, same := user()
	if same != addr {
		t.Errorf("servers at %s and %s", addr, same)
	}
	end(first)
	if !listens(addr) {
		t.Error("the server ended with one of its users")
	}
	third, same := user()
	if same != addr {
		t.Errorf("servers at %s and %s", addr, same)
	}
	end(second)
	end(third)
	if err := users.Close(); err != nil {
		t.Fatal(err)
	}
	inherited = nil
	run := filepath.Join(shared, "s3", "run")
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for ; ; <-tick.C { // until go test's own timeout
		if _, err := os.Stat(run); errors.Is(err, fs.ErrNotExist) && !listens(addr) {
			break
		}
	}
	last, addr := user()
	if !listens(addr) {
		t.Error("the next user has no server")
	}
	end(last)
	for ; ; <-tick.C {
		if _, err := os.Stat(run); errors.Is(err, fs.ErrNotExist) {
			return
		}
	}
}

var use = flag.Bool("use", false, "internal: use a shared server, print its URL, wait")

// TestUse is the other half of TestSharedServerEndsWithItsUsers.
func TestUse(t *testing.T) {
	if !*use {
		return
	}
	fmt.Fprintln(os.Stdout, "\nurl", testenv.S3(t).Endpoint)
	select {}
}

func home(t *testing.T) string {
	dir, err := os.UserHomeDir()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func listens(addr string) bool {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}

// below lists what a process started, and what that started.
func below(t *testing.T, root int) []int {
	t.Helper()
	out, err := exec.Command("ps", "-A", "-o", "pid=,ppid=").Output()
	if err != nil {
		t.Fatal(err)
	}
	parents := map[int]int{}
	for line := range strings.Lines(string(out)) {
		var p, pp int
		if n, _ := fmt.Sscan(line, &p, &pp); n == 2 {
			parents[p] = pp
		}
	}
	var pids []int
	for p := range parents {
		for q := parents[p]; q > 1; q = parents[q] {
			if q == root {
				pids = append(pids, p)
				break
			}
		}
	}
	return pids
}

func exists(pid int) bool {
	out, _ := exec.Command("ps", "-o", "stat=", "-p", strconv.Itoa(pid)).Output() // none: it fails
	return len(out) > 0 && out[0] != 'Z'
}
