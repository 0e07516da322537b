package testenv

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
)

// A server that takes long to start is shared by the test binaries of a user
// that run at the same time, as go test ./... makes them: the first starts it,
// the end of the last stops it. Each user holds a shared lock on the file
// users; a supervisor waits until it gets that lock for itself. The file lock
// serialises starting and stopping.
//
// .mise/tasks/test/all holds users too, so that the servers stay between the
// packages.

// superviseShared: $1 is the server's directory. Descriptor 7 says that a
// supervisor lives.
const superviseShared = `
exec 7>"$1/supervisor" 8>"$1/users" 9>"$1/lock"
flock -n 7 || exit 1
echo up
exec >/dev/null
while :; do
	flock 8
	flock -u 8
	flock 9
	flock -n 8 && break
	flock -u 9
done
` + `set -- "$1/run"
` + stopServers + `rm -rf "$1"`

// SharedDir is where the servers of all test binaries of this user live.
func SharedDir() string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("solstice-testenv-%d", os.Getuid()))
}

// share returns what launch said of the server of that kind, which another
// binary may have started. launch gets the server's directory.
func share[T any](kind string, launch func(dir string) (T, error)) (T, error) {
	var none T
	keepInherited()
	if _, err := exec.LookPath("flock"); err != nil {
		return none, fmt.Errorf("the program flock is needed (Debian: apt-get install util-linux): %w", err)
	}
	base := filepath.Join(SharedDir(), kind)
	if err := os.MkdirAll(base, 0o700); err != nil {
		return none, err
	}
	if info, err := os.Stat(SharedDir()); err != nil || info.Mode().Perm() != 0o700 || info.Sys().(*syscall.Stat_t).Uid != uint32(os.Getuid()) {
		return none, fmt.Errorf("%s is not this user's alone (%w)", SharedDir(), err)
	}
	lock, err := locked(filepath.Join(base, "lock"), syscall.LOCK_EX)
	if err != nil {
		return none, err
	}
	defer lock.Close()
	users, err := locked(filepath.Join(base, "users"), syscall.LOCK_SH)
	if err != nil {
		return none, err
	}
	held.Lock()
	held.files = append(held.files, users) // for as long as this process lives
	held.Unlock()

	run, said := filepath.Join(base, "run"), filepath.Join(base, "run", "said")
	supervised, err := hasSupervisor(base)
	if err != nil {
		return none, err
	}
	if supervised {
		var v T
		if b, err := os.ReadFile(said); err == nil && json.Unmarshal(b, &v) == nil {
			return v, nil
		}
	} else if err := supervise(base); err != nil {
		return none, err
	}
	// Nothing, or what a binary left that was killed while it started a server.
	if out, err := exec.Command("/bin/sh", "-c", stopServers+`rm -rf "$1"`, "sh", run).CombinedOutput(); err != nil {
		return none, fmt.Errorf("%w: %s", err, out)
	}
	if err := os.Mkdir(run, 0o700); err != nil {
		return none, err
	}
	v, err := launch(run)
	if err != nil {
		return none, err
	}
	b, err := json.Marshal(v)
	if err != nil {
		return none, err
	}
	return v, errors.Join(os.WriteFile(said+".new", b, 0o600), os.Rename(said+".new", said))
}

// keepInherited keeps descriptors that this process was given from what it
// starts: servers and their supervisors would hold locks through them, without end.
func keepInherited() {
	open, _ := os.ReadDir("/dev/fd") // of Linux and macOS
	for _, e := range open {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
}

// held keeps files from being closed by the garbage collector.
var held struct {
	sync.Mutex
	files []*os.File
}

func locked(path string, how int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), how); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f, nil
}

func hasSupervisor(base string) (bool, error) {
	f, err := locked(filepath.Join(base, "supervisor"), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	return false, f.Close()
}

// supervise starts the supervisor, and returns once it holds its lock.
func supervise(base string) error {
	cmd := exec.Command("/bin/sh", "-c", superviseShared, "sh", base)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	var said [3]byte
	_, err = out.Read(said[:])
	if err != nil {
		return fmt.Errorf("supervise %s: %w", base, errors.Join(err, cmd.Wait()))
	}
	go func() { _ = cmd.Wait() }()
	return nil
}
