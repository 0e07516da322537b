package testenv

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// ownNetwork is the argument of a test binary that OwnNetwork started.
const ownNetwork = "own-network"

func inOwnNetwork() bool { return slices.Contains(flag.Args(), ownNetwork) }

// OwnNetwork runs the calling test in a network namespace that has nothing but
// its loopback: it starts the test binary again there, for this test only, and
// where it gives false, the test has run, and returns. It needs root.
func OwnNetwork(t *testing.T) bool {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, "a network namespace", "it needs root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		Missing(t, "ip", "Debian: apt-get install iproute2")
	}
	if inOwnNetwork() {
		IP(t, "link", "set", "lo", "up")
		return true
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"-test.run=^" + regexp.QuoteMeta(t.Name()) + "$", "-test.v"}
	if end, ok := t.Deadline(); ok {
		args = append(args, "-test.timeout="+time.Until(end).String())
	}
	cmd := exec.Command(self, append(args, "--", ownNetwork)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // whose death is the child's
	err = cmd.Run()
	runtime.UnlockOSThread()
	switch {
	case err != nil:
		t.Errorf("in a network namespace: %v\n%s", err, &out)
	case strings.Contains(out.String(), "--- SKIP: "+t.Name()):
		t.Skip(out.String())
	case !strings.Contains(out.String(), "--- PASS: "+t.Name()):
		t.Errorf("in a network namespace it did not run:\n%s", &out)
	}
	return false
}

// IP runs ip(8) in this network namespace.
func IP(t testing.TB, args ...string) {
	t.Helper()
	if err := ip(args...); err != nil {
		t.Fatal(err)
	}
}

func ip(args ...string) error {
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// Beyond makes another network namespace, at the far end of a cable whose near
// end is the interface near, and calls f in it. What f opens stays there. Far is
// the far end's name.
func Beyond(t testing.TB, near, far string, f func() error) {
	t.Helper()
	IP(t, "link", "add", near, "type", "veth", "peer", "name", far)
	done, thread, moved := make(chan error), make(chan int, 1), make(chan bool, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: it ends with the goroutine
		err := syscall.Unshare(syscall.CLONE_NEWNET)
		thread <- syscall.Gettid()
		if <-moved && err == nil {
			if err = ip("link", "set", "lo", "up"); err == nil {
				err = f()
			}
		}
		done <- err
		<-t.Context().Done() // or the namespace would be gone, where nothing is open
	}()
	err := ip("link", "set", far, "netns", fmt.Sprint(<-thread))
	moved <- err == nil
	if ferr := <-done; err != nil || ferr != nil {
		t.Fatalf("beyond: %v, %v", err, ferr)
	}
}
