package testenv

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// stopServers kills what the pid files *.pid of directory $1 name, and waits
// until it is gone. Their data go with them, so there is nothing to wind down.
const stopServers = `
for f in "$1"/*.pid; do
	pid=
	read -r pid <"$f" || [ "$pid" ] || continue # a line without an end
	kill -KILL "$pid"
	n=0
	while kill -0 "$pid" && [ $n -lt 100 ]; do
		case $(ps -o stat= -p "$pid") in Z*) break ;; esac
		n=$((n+1)); sleep 0.1
	done
done 2>/dev/null
`

// keeper stops a private server when the test binary ends, however it ends, and
// removes its directory.
type keeper struct {
	alive *os.File // closed, by the kernel when this process dies
	cmd   *exec.Cmd
}

// keep begins to look after dir; stop is the script that stops what runs there.
func keep(dir, stop string) (*keeper, error) {
	keepInherited()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	k := &keeper{alive: w, cmd: exec.Command("/bin/sh", "-c", "cat >/dev/null\n"+stop+`rm -rf "$1"`, "sh", dir)}
	k.cmd.Stdin = r
	k.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // outlives ^C and a killed process group
	err = k.cmd.Start()
	_ = r.Close()
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return k, nil
}

// close stops the server and removes the directory.
func (k *keeper) close() error { return errors.Join(k.alive.Close(), k.cmd.Wait()) }

// keptDir makes a directory that is kept.
func keptDir(name string) (string, *keeper, error) {
	dir, err := os.MkdirTemp("", "solstice-"+name+"-")
	if err != nil {
		return "", nil, err
	}
	k, err := keep(dir, stopServers)
	if err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(dir))
	}
	return dir, k, nil
}

// private makes a directory that is kept, calls launch with it, and stops and
// removes everything when the test ends.
func private(t testing.TB, name string, launch func(dir string) error) {
	t.Helper()
	dir, k, err := keptDir(name)
	if err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	t.Cleanup(func() {
		if err := k.close(); err != nil {
			t.Errorf("stop %s: %v", name, err)
		}
	})
	if err := launch(dir); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
}

// spawn starts a program of a server in a session of its own, with an
// environment built from nothing. Its pid goes to NAME.pid in dir, what it says
// to NAME.log.
func spawn(dir, name string, env []string, argv ...string) error {
	out, err := os.OpenFile(filepath.Join(dir, name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, env, out, out // no pipe: go test would wait for its end
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }() // no zombie, and its end shows when it is probed
	return os.WriteFile(filepath.Join(dir, name+".pid"), []byte(strconv.Itoa(cmd.Process.Pid)+"\n"), 0o600)
}

// await probes until the probe succeeds. pidFile names the process whose end
// ends the waiting, logs what is shown then.
func await(dir, pidFile string, probe func(ctx context.Context) error, logs ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	tick := time.NewTicker(25 * time.Millisecond)
	defer tick.Stop()
	for {
		err := probe(ctx)
		if err == nil {
			return nil
		}
		if pid, perr := readPID(filepath.Join(dir, pidFile)); perr == nil && !alive(pid) {
			err = fmt.Errorf("it ended: %w", err)
		} else {
			select {
			case <-tick.C:
				continue
			case <-ctx.Done():
			}
		}
		for _, l := range logs {
			said, _ := os.ReadFile(filepath.Join(dir, l))
			err = fmt.Errorf("%w\n%s:\n%s", err, l, said[max(0, len(said)-4000):])
		}
		return err
	}
}

func alive(pid int) bool {
	return !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) && !isZombie(pid)
}

func readPID(file string) (int, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// signal sends a signal to the processes that pid files name.
func signal(t testing.TB, s syscall.Signal, pidFiles ...string) {
	t.Helper()
	for _, f := range pidFiles {
		pid, err := readPID(f)
		if err == nil {
			err = syscall.Kill(pid, s)
		}
		if err != nil {
			t.Fatalf("signal %v to %s: %v", s, filepath.Base(f), err)
		}
	}
}

// kill ends the process of a pid file as a crash would, and waits until it is
// gone.
func kill(t testing.TB, pidFile string) {
	t.Helper()
	signal(t, syscall.SIGKILL, pidFile)
	pid, err := readPID(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	waitGone(t, pid)
	if err := os.Remove(pidFile); err != nil { // the pid may be another's by the end of the test
		t.Fatal(err)
	}
}

// freePorts returns n different ports of 127.0.0.1 that nobody listens at.
func freePorts(n int) ([]int, error) {
	ports := make([]int, n)
	for i := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // not before all are chosen
		ports[i] = l.Addr().(*net.TCPAddr).Port
	}
	return ports, nil
}

// loopback is the address of a port.
func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
