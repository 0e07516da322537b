package testenv

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
)

// startTimeout bounds starting, stopping and initialising a server.
const startTimeout = 2 * time.Minute

// errNoPostgres: the programs are not installed.
var errNoPostgres = errors.New("PostgreSQL's server programs were not found (Debian: apt-get install postgresql-15)")

// shared is the server that all tests of this binary use, started by the first.
var shared = sync.OnceValues(func() (*PostgresServer, error) { return newPostgres() })

// databases numbers the databases made in this process.
var databases struct {
	sync.Mutex
	n int
}

// Postgres returns the URL of a fresh database on the server that the tests of
// this binary share; it is dropped when the test ends.
func Postgres(t testing.TB) string {
	t.Helper()
	s, err := shared()
	if err != nil {
		missing(t, err)
	}
	return s.Database(t)
}

// PostgresServer is a private server with a data directory of its own.
type PostgresServer struct {
	bin    string // directory of the programs
	dir    string
	port   int
	as     []string // command prefix that changes to an unprivileged user
	keeper *keeper
}

// StartPostgres starts a server that only this test uses, and so may kill,
// pause and restart. It is stopped when the test ends.
func StartPostgres(t testing.TB) *PostgresServer {
	t.Helper()
	s, err := newPostgres()
	if err != nil {
		missing(t, err)
	}
	t.Cleanup(func() {
		if err := s.keeper.close(); err != nil {
			t.Errorf("stop PostgreSQL: %v", err)
		}
	})
	return s
}

func missing(t testing.TB, err error) {
	t.Helper()
	if errors.Is(err, errNoPostgres) {
		Missing(t, "PostgreSQL", err.Error())
	}
	t.Fatalf("start PostgreSQL: %v", err)
}

// URL of a database on the server.
func (s *PostgresServer) URL(database string) string {
	return fmt.Sprintf("postgres://postgres@127.0.0.1:%d/%s?sslmode=disable", s.port, database)
}

// Database makes an empty database and returns its URL; it is dropped when the
// test ends.
func (s *PostgresServer) Database(t testing.TB) string {
	t.Helper()
	return s.database(t, "")
}

// DatabaseIn is Database with its tables and indexes below dir, which everybody
// may enter; the server's log of transactions stays where it is.
func (s *PostgresServer) DatabaseIn(t testing.TB, dir string) string {
	t.Helper()
	space := filepath.Join(dir, "postgres")
	owner, err := s.dropPrivileges()
	if err == nil {
		err = os.Mkdir(space, 0o700)
	}
	if err == nil && owner != nil {
		err = os.Chown(space, owner.uid, owner.gid)
	}
	if err == nil {
		err = s.admin("CREATE TABLESPACE apart LOCATION '" + space + "'")
	}
	if err != nil {
		t.Fatal(err)
	}
	return s.database(t, " TABLESPACE apart")
}

func (s *PostgresServer) database(t testing.TB, where string) string {
	t.Helper()
	databases.Lock()
	databases.n++
	name := fmt.Sprintf("t%d", databases.n)
	databases.Unlock()
	if err := s.admin("CREATE DATABASE " + name + where); err != nil {
		t.Fatalf("create a database: %v", err)
	}
	t.Cleanup(func() {
		if err := s.admin("DROP DATABASE IF EXISTS " + name + " WITH (FORCE)"); err != nil {
			t.Logf("drop %s: %v", name, err) // the test may have killed the server
		}
	})
	return s.URL(name)
}

func (s *PostgresServer) admin(statement string) error {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	db, err := sqldb.Open(ctx, s.URL("postgres"), sqldb.Options{MaxConns: 1})
	if err != nil {
		return err
	}
	defer db.Close()
	_, err = db.ExecContext(ctx, statement)
	return err
}

// Kill ends the server with SIGKILL, as a crash would, and waits until it is
// gone with its children.
func (s *PostgresServer) Kill(t testing.TB) {
	t.Helper()
	pids := s.pids(t)
	if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil { // the children notice and exit
		t.Fatalf("kill PostgreSQL: %v", err)
	}
	for _, pid := range pids {
		waitGone(t, pid)
	}
	// A zombie that nobody reaps keeps the server from starting again.
	if err := os.Remove(filepath.Join(s.dir, "data", "postmaster.pid")); err != nil {
		t.Fatalf("kill PostgreSQL: %v", err)
	}
}

// Start starts the server again after Kill.
func (s *PostgresServer) Start(t testing.TB) {
	t.Helper()
	if err := s.start(); err != nil {
		t.Fatalf("start PostgreSQL: %v", err)
	}
}

// Restart stops the server, breaking all connections, and starts it.
func (s *PostgresServer) Restart(t testing.TB) {
	t.Helper()
	if err := s.ctl("restart", "-m", "fast"); err != nil {
		t.Fatalf("restart PostgreSQL: %v", err)
	}
}

// Pause stops the server and its children with SIGSTOP: connections stay open
// and nothing answers. Resume lets them go on.
func (s *PostgresServer) Pause(t testing.TB) { s.signal(t, syscall.SIGSTOP) }

// Resume ends a Pause.
func (s *PostgresServer) Resume(t testing.TB) { s.signal(t, syscall.SIGCONT) }

func (s *PostgresServer) signal(t testing.TB, sig syscall.Signal) {
	t.Helper()
	for _, pid := range s.pids(t) {
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatalf("signal PostgreSQL: %v", err)
		}
	}
}

// pids returns the postmaster's pid and its children's.
func (s *PostgresServer) pids(t testing.TB) []int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.dir, "data", "postmaster.pid"))
	if err != nil {
		t.Fatalf("PostgreSQL's pid: %v", err)
	}
	first, _, _ := strings.Cut(string(b), "\n")
	pid, err := strconv.Atoi(first)
	if err != nil {
		t.Fatalf("PostgreSQL's pid: %v", err)
	}
	out, err := exec.Command("ps", "-A", "-o", "pid=,ppid=").Output()
	if err != nil {
		t.Fatalf("list processes: %v", err)
	}
	pids := []int{pid}
	for line := range strings.Lines(string(out)) {
		var p, pp int
		if n, _ := fmt.Sscan(line, &p, &pp); n == 2 && pp == pid {
			pids = append(pids, p)
		}
	}
	return pids
}

func waitGone(t testing.TB, pid int) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(startTimeout); ; <-tick.C {
		if err := syscall.Kill(pid, 0); errors.Is(err, syscall.ESRCH) || isZombie(pid) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d is still there", pid)
		}
	}
}

// isZombie: where pid 1 reaps nobody, dead orphans stay in the table.
func isZombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return strings.HasPrefix(rest, "Z")
}

// stopPostgres stops the server whose directory is $1, also a paused one.
const stopPostgres = `
if [ -s "$1/data/postmaster.pid" ] && read -r pid <"$1/data/postmaster.pid"; then
	kill -CONT "$pid"
	kill -QUIT "$pid"
	n=0
	while [ -e "$1/data/postmaster.pid" ] && kill -0 "$pid" && [ $n -lt 100 ]; do n=$((n+1)); sleep 0.1; done
	kill -KILL "$pid"
fi 2>/dev/null
`

func newPostgres() (_ *PostgresServer, err error) {
	bin, err := findPostgres()
	if err != nil {
		return nil, err
	}
	s := &PostgresServer{bin: bin}
	owner, err := s.dropPrivileges()
	if err != nil {
		return nil, err
	}
	if s.dir, err = os.MkdirTemp("", "solstice-pg-"); err != nil {
		return nil, err
	}
	if s.keeper, err = keep(s.dir, stopPostgres); err != nil {
		return nil, errors.Join(err, os.RemoveAll(s.dir))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.keeper.close())
		}
	}()
	if owner != nil {
		if err := os.Chown(s.dir, owner.uid, owner.gid); err != nil {
			return nil, err
		}
	}
	if err := s.initialise(owner); err != nil {
		return nil, err
	}
	return s, s.start()
}

type account struct{ uid, gid int }

// dropPrivileges prepares to run as postgres when this is root, which
// PostgreSQL refuses to run as.
func (s *PostgresServer) dropPrivileges() (*account, error) {
	if os.Getuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, fmt.Errorf("%w: running as root and there is no user postgres", errNoPostgres)
	}
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		return nil, fmt.Errorf("%w: running as root and there is no setpriv", errNoPostgres)
	}
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	s.as = []string{setpriv, "--reuid=" + u.Uid, "--regid=" + u.Gid, "--clear-groups", "--"}
	return &account{uid, gid}, nil
}

func (s *PostgresServer) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	argv := append(slices.Clone(s.as), filepath.Join(s.bin, name))
	cmd := exec.CommandContext(ctx, argv[0], append(argv[1:], args...)...)
	cmd.Dir = s.dir
	cmd.Env = []string{"HOME=" + s.dir, "LC_ALL=C.UTF-8", "TZ=UTC"}
	return cmd
}

func (s *PostgresServer) run(name string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	// A file, not a pipe: the server would keep a pipe open for its whole life.
	out, err := os.Create(filepath.Join(s.dir, name+".out"))
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := s.command(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		b, _ := os.ReadFile(out.Name())
		l, _ := os.ReadFile(filepath.Join(s.dir, "log"))
		return fmt.Errorf("%s: %w\n%s%s", name, err, b, l)
	}
	return nil
}

func (s *PostgresServer) ctl(verb string, args ...string) error {
	return s.run("pg_ctl", append([]string{"-D", filepath.Join(s.dir, "data"), "-w", "-t", "110", "-l", filepath.Join(s.dir, "log"), verb}, args...)...)
}

// start starts the server, the first time on a free port.
func (s *PostgresServer) start() error {
	var err error
	for range 5 { // somebody else may take the port meanwhile
		first := s.port == 0
		if first {
			ports, err := freePorts(1)
			if err != nil {
				return err
			}
			s.port = ports[0]
		}
		opts := fmt.Sprintf("-p %d -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c max_connections=200 -c fsync=off", s.port)
		if err = s.ctl("start", "-o", opts); err == nil || !first {
			return err
		}
		s.port = 0
	}
	return err
}

// initialise makes the data directory, from a copy kept in the user's cache
// directory where there is one.
func (s *PostgresServer) initialise(owner *account) error {
	data := filepath.Join(s.dir, "data")
	version, err := exec.Command(filepath.Join(s.bin, "initdb"), "--version").Output()
	if err != nil {
		return fmt.Errorf("initdb --version: %w", err)
	}
	cached := ""
	if cache, err := os.UserCacheDir(); err == nil {
		key := regexp.MustCompile(`[^A-Za-z0-9.]+`).ReplaceAllString(strings.TrimSpace(string(version)), "-")
		cached = filepath.Join(cache, "solstice", "testenv", key)
		switch err := copyTree(cached, data, owner); {
		case err == nil:
			return nil
		case !errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("copy %s: %w", cached, err)
		}
	}
	if err := s.run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"); err != nil {
		return err
	}
	if cached == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(cached), 0o755); err != nil {
		return nil //nolint:nilerr // without a cache the next binary is slower, nothing else
	}
	tmp, err := os.MkdirTemp(filepath.Dir(cached), "new-")
	if err != nil {
		return nil //nolint:nilerr // as above
	}
	if copyTree(data, filepath.Join(tmp, "data"), nil) == nil {
		_ = os.Rename(filepath.Join(tmp, "data"), cached) // fails where another binary was faster
	}
	return os.RemoveAll(tmp)
}

func copyTree(from, to string, owner *account) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		if d.IsDir() {
			err = os.Mkdir(target, 0o700)
		} else {
			var b []byte
			if b, err = os.ReadFile(path); err == nil {
				err = os.WriteFile(target, b, 0o600)
			}
		}
		if err == nil && owner != nil {
			err = os.Lchown(target, owner.uid, owner.gid)
		}
		return err
	})
}

// findPostgres returns the directory of the newest server programs.
func findPostgres() (string, error) {
	var dirs []string
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin",
		"/opt/homebrew/opt/postgresql@*/bin", "/usr/local/opt/postgresql@*/bin",
	} {
		m, err := filepath.Glob(pattern)
		if err != nil {
			return "", err
		}
		dirs = append(dirs, m...)
	}
	number := regexp.MustCompile(`\d+`)
	slices.SortFunc(dirs, func(a, b string) int {
		x, _ := strconv.Atoi(number.FindString(a))
		y, _ := strconv.Atoi(number.FindString(b))
		return y - x
	})
	if p, err := exec.LookPath("initdb"); err == nil {
		dirs = append([]string{filepath.Dir(p)}, dirs...)
	}
	for _, d := range dirs {
		if _, err := os.Stat(filepath.Join(d, "initdb")); err == nil {
			return d, nil
		}
	}
	return "", errNoPostgres
}
