package testenv

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// daemonPatience bounds every wait for a daemon; it only ends what hangs.
const daemonPatience = 3 * time.Minute

// Daemon is a program that a test started, which logs JSON to its stderr.
type Daemon struct {
	Cmd     *exec.Cmd
	Started chan struct{} // closed when it said that it is up
	Ended   chan struct{} // closed when it is gone, and Err is set
	Err     error

	t    testing.TB
	said map[string]any // the record that said so
}

// Launch starts a daemon, which is up when it logs msg, and kills it at the
// test's end. What it logged is shown when the test failed.
func Launch(t testing.TB, cmd *exec.Cmd, msg string) *Daemon {
	t.Helper()
	d := &Daemon{Cmd: cmd, Started: make(chan struct{}), Ended: make(chan struct{}), t: t}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	go func() {
		defer close(d.Ended)
		lines := bufio.NewScanner(io.TeeReader(stderr, &log))
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var r map[string]any
			if d.said == nil && json.Unmarshal(lines.Bytes(), &r) == nil && r["msg"] == msg {
				d.said = r
				close(d.Started)
			}
		}
		d.Err = cmd.Wait()
	}()
	t.Cleanup(func() {
		d.Stop(syscall.SIGKILL)
		if t.Failed() || strings.Contains(log.String(), "DATA RACE") {
			t.Errorf("%s said:\n%s", cmd.Path, &log)
		}
	})
	return d
}

// Await waits until the daemon is up.
func (d *Daemon) Await() {
	d.t.Helper()
	select {
	case <-d.Started:
	case <-d.Ended:
		d.t.Fatalf("did not start: %v", d.Err)
	case <-time.After(daemonPatience):
		d.t.Fatal("did not start in time")
	}
}

// Said is a value of the record that said that the daemon is up.
func (d *Daemon) Said(key string) string {
	d.t.Helper()
	<-d.Started
	s, ok := d.said[key].(string)
	if !ok {
		d.t.Fatalf("the daemon did not say its %s: %v", key, d.said)
	}
	return s
}

// Stop sends a signal and waits for the end.
func (d *Daemon) Stop(s syscall.Signal) {
	d.t.Helper()
	_ = d.Cmd.Process.Signal(s) // gone already
	select {
	case <-d.Ended:
	case <-time.After(daemonPatience):
		d.t.Errorf("%s does not end", d.Cmd.Path)
		_ = d.Cmd.Process.Kill()
		<-d.Ended
	}
}
