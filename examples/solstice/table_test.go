package main

import (
	"errors"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// TestWhyAnAttemptFailed: class, reason and the end of the console, whatever
// the machine wrote there.
func TestWhyAnAttemptFailed(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	attempt := func(n int, class solstice.Class, reason, console string, lost bool) attemptDetails {
		return attemptDetails{Attempt: solstice.Attempt{Number: n, Class: class, Reason: reason, Console: console, LogLost: lost}}
	}
	details := runDetails{
		Run: solstice.Run{ID: "0193abcd-1234-7001", State: solstice.RunErrored, Workflow: "w", WorkflowPath: "w.yaml", Reason: "a job was errored", LogsRemoved: true, CreatedAt: at, FinishedAt: at.Add(time.Minute)},
		Jobs: []jobDetails{{
			Job: solstice.Job{ID: "0193abcd-1234-7002", Name: "illumos\x1b[2J", State: solstice.JobErrored, Class: solstice.ClassBoot, Reason: "gave up"},
			AttemptList: []attemptDetails{
				attempt(1, solstice.ClassBoot, "its agent never attached", "loading kernel\n\x1b]0;pwned\x07panic: no root\n", false),
				attempt(2, solstice.ClassAgentLost, "its agent is gone", "", true),
				attempt(3, "", "", "", false),
			},
		}, {
			Job:     solstice.Job{ID: "0193abcd-1234-7003", Name: "next", State: solstice.JobQueued},
			Waiting: &solstice.Waiting{Reason: solstice.WaitBehind, Message: "3 jobs come first"},
		}},
	}
	var b strings.Builder
	details.print(newScreen(&b, false, nil))
	want := `! w errored in 1m0s
  run       0193abcd-1234-7001
  of         at
  workflow  w.yaml,
  because   a job was errored
  logs      removed by retention

     JOB      STATE    TOOK  ID
  !  illumos  errored        0193abcd-1234-7002  gave up
  ·  next     queued         0193abcd-1234-7003  3 jobs come first

  illumos, attempt 1: boot: its agent never attached
    the machine's console ended with:
      loading kernel
      panic: no root

  illumos, attempt 2: agent lost: its agent is gone
    the end of its log is lost
`
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

func TestShort(t *testing.T) {
	const a, b, c = "0193abcd-1234-7001-aa", "0193abcd-1234-7002-bb", "0193abcd-9999-7002-bb"
	for id, want := range map[string]string{a: "0193abcd-1234-7001", b: "0193abcd-1234-7002", c: "0193abcd-9999"} {
		if got := short(a, b, c, "")[id]; got != want {
			t.Errorf("%s is short %s, want %s", id, got, want)
		}
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m", 119 * time.Minute: "119m", 2 * time.Hour: "2h", 47 * time.Hour: "47h", 72 * time.Hour: "3d",
	} {
		if got := span(d); got != want {
			t.Errorf("span(%s) = %s, want %s", d, got, want)
		}
	}
	if got := age(time.Time{}, time.Now()); got != "never" {
		t.Errorf("what never was has age %s", got)
	}
}

// TestTimestamps: lines over several pieces have the time of their beginning.
func TestTimestamps(t *testing.T) {
	at := func(s int) time.Time { return time.Date(2026, 1, 2, 3, 4, s, 0, time.UTC) }
	var b strings.Builder
	s := stamper{w: &b}
	for _, c := range []logstream.Chunk{
		{Offset: 10, Data: []byte("one\ntw"), Marks: []logstream.Mark{{Offset: 10, Time: at(1)}, {Offset: 14, Time: at(2)}}},
		{Offset: 16, Data: []byte("o\nthree\n\nfour"), Marks: []logstream.Mark{{Offset: 14, Time: at(2)}, {Offset: 18, Time: at(3)}, {Offset: 25, Time: at(4)}}},
	} {
		if err := s.write(c); err != nil {
			t.Fatal(err)
		}
	}
	want := "2026-01-02T03:04:01.000Z one\n2026-01-02T03:04:02.000Z two\n2026-01-02T03:04:03.000Z three\n2026-01-02T03:04:03.000Z \n2026-01-02T03:04:04.000Z four"
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

// TestTerminalOfALog: what could harm a terminal is left away, unless asked for.
func TestTerminalOfALog(t *testing.T) {
	t.Parallel()
	s := serve(t)
	u := s.user(workflowRepo(t, hostile))
	run := u.enqueue()
	u.over(run.ID)
	if out := u.onTerminal("logs", run.ID); strings.Contains(out, "pwned") || strings.Contains(out, "\x1b[2J") || !strings.Contains(out, "\x1b[32mgreen\x1b[0m") {
		t.Errorf("the terminal got %q", out)
	}
	if out := u.onTerminal("logs", "--plain", run.ID); out != "green\r\n" {
		t.Errorf("without colours: %q", out)
	}
	has(t, "raw", u.onTerminal("logs", "--raw", run.ID), "\x1b]0;pwned\x07\x1b[2J\x1b[32mgreen")
	if out := u.ok("logs", run.ID); out != "\x1b]0;pwned\x07\x1b[2J\x1b[32mgreen\x1b[0m\n" {
		t.Errorf("a pipe got %q", out)
	}
	has(t, "watch", u.onTerminal("status", "--watch", run.ID), "\x1b[H", "succeeded", "JOB")
}

// onTerminal runs the program to its end on a terminal of its own.
func (u *user) onTerminal(args ...string) string {
	u.t.Helper()
	cmd := u.command(args...)
	tty, err := pty.Start(cmd)
	if err != nil {
		u.t.Fatal(err)
	}
	defer tty.Close()
	b, err := io.ReadAll(tty)
	if err != nil && !errors.Is(err, syscall.EIO) { // how Linux says that nobody has it open any more
		u.t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		u.t.Errorf("%v: %s", err, b)
	}
	return string(b)
}
