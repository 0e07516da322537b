package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/solstice-ci/solstice-go/internal/proctree"
)

// Variables that mark what belongs to a machine.
const machineVar = "SOLSTICE_MACHINE_ID"

// killTimeout bounds the hunt for what a job left behind; a process that cannot
// be killed (in an uninterruptible system call) must not hang the agent.
const killTimeout = 30 * time.Second

// becomeReaper makes this process the parent of its orphaned descendants, and
// says whether it is.
func becomeReaper(log *slog.Logger) bool {
	err := proctree.SetSubreaper()
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		log.Warn("cannot adopt orphans; processes that leave their session are found by their environment only", "error", err)
	}
	return err == nil
}

// leftError says that processes of the job could not be killed.
type leftError struct{ err error }

func (e *leftError) Error() string       { return "processes of the job are left: " + e.err.Error() }
func (e *leftError) Unwrap() error       { return e.err }
func (e *leftError) ProcessesLeft() bool { return true }

// processes are those of one job.
type processes struct {
	log       *slog.Logger
	marker    string
	dedicated bool
	adopts    bool             // orphans of the job are children of this process
	cgroup    *proctree.Cgroup // nil: none
	escaped   bool             // something was started outside cgroup
	spawn     func(func())
	reaper    proctree.Reaper
	discards  sync.WaitGroup
	pipes     []*os.File // of leftovers, being discarded
	running   []proctree.ID
	left      error // what the last hunt could not kill
}

func newProcesses(a *agent, log *slog.Logger) *processes {
	ps := &processes{log: log, marker: machineVar + "=" + a.machineID, dedicated: a.cfg.Dedicated, adopts: a.adopts, spawn: a.spawn}
	if a.cfg.Cgroup == "" {
		return ps
	}
	var err error
	if ps.cgroup, err = proctree.OpenCgroup(a.cfg.Cgroup); err != nil {
		log.Warn("the control group is not used", "error", err)
		ps.cgroup = nil
	}
	return ps
}

// process is a running step, leader of its session.
type process struct {
	ps     *processes
	cmd    *exec.Cmd
	id     proctree.ID
	out    *pump
	exited chan struct{}
}

// start starts cmd in a session of its own; sink gets what it prints. Standard
// output and error are one pipe: only so do both come in the order they were
// printed in.
func (ps *processes) start(cmd *exec.Cmd, sink func([]byte)) (*process, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, infra(err)
	}
	widen(r)
	cmd.Stdout, cmd.Stderr = w, w
	cmd, err = ps.begin(cmd)
	closeAll(w)
	if err != nil {
		closeAll(r)
		return nil, err
	}
	p := &process{ps: ps, cmd: cmd, exited: make(chan struct{})}
	if e, err := proctree.Lookup(cmd.Process.Pid); err == nil {
		p.id = e.ID
		ps.running = append(ps.running, e.ID)
	} else {
		ps.log.Warn("process not found after its start", "pid", cmd.Process.Pid, "error", err)
	}
	p.out = startPump(r, sink, ps.spawn)
	ps.spawn(func() {
		defer close(p.exited)
		_ = ps.reaper.Wait(cmd) // the state says it all
	})
	return p, nil
}

// begin starts cmd, in the control group where there is one and that works, and
// gives the command that was started.
func (ps *processes) begin(cmd *exec.Cmd) (*exec.Cmd, error) {
	if ps.cgroup != nil && !ps.escaped {
		outside := &exec.Cmd{
			Path: cmd.Path, Args: cmd.Args, Env: cmd.Env, Dir: cmd.Dir, Stdout: cmd.Stdout, Stderr: cmd.Stderr,
			SysProcAttr: &syscall.SysProcAttr{Setsid: true},
		}
		done, err := ps.cgroup.Attach(cmd)
		if err == nil {
			err = ps.reaper.Start(cmd)
			done()
		}
		if err == nil {
			return cmd, nil
		}
		// A kernel that forbids it, or a program that cannot be started at all.
		ps.escaped = true
		cmd = outside
	}
	return cmd, ps.reaper.Start(cmd)
}

func closeAll(files ...*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// finish waits for the end of what the process printed. Where somebody still
// holds the output, the rest of it is discarded.
func (p *process) finish() {
	p.out.finish()
	if !p.out.open {
		closeAll(p.out.r)
		return
	}
	p.ps.pipes = append(p.ps.pipes, p.out.r)
	p.ps.discards.Go(func() { discard(p.out.r) })
}

// signal sends to the process group.
func (p *process) signal(sig syscall.Signal) {
	if err := syscall.Kill(-p.cmd.Process.Pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		p.ps.log.Warn("signal", "pid", p.cmd.Process.Pid, "signal", sig, "error", err)
	}
}

// terminate asks the group to end and kills it after the grace, or when kill is
// closed. It returns when the process has ended.
func (p *process) terminate(grace time.Duration, kill <-chan struct{}) {
	p.signal(syscall.SIGTERM)
	p.signal(syscall.SIGCONT) // a stopped process gets no other signal
	t := time.NewTimer(grace)
	defer t.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for waiting := true; waiting; {
		select {
		case <-t.C:
			waiting = false
		case <-kill:
			waiting = false
		case <-tick.C:
			// The leader may end before those who clean up.
			waiting = !p.groupGone()
		}
	}
	p.kill()
}

func (p *process) groupGone() bool {
	select {
	case <-p.exited:
	default:
		return false
	}
	if p.ps.dedicated {
		p.ps.reaper.Reap()
	}
	return errors.Is(syscall.Kill(-p.cmd.Process.Pid, 0), syscall.ESRCH)
}

// kill ends the group and all descendants, and waits for the process's end.
func (p *process) kill() {
	if !p.id.IsZero() {
		p.ps.hunt(proctree.Target{Root: p.id, Reaper: p.ps.own()})
	}
	p.signal(syscall.SIGKILL)
	<-p.exited
}

// own is the reaper where zombies are this process's to take away.
func (ps *processes) own() *proctree.Reaper {
	if ps.dedicated {
		return &ps.reaper
	}
	return nil
}

// killAll ends everything that the job started and closes what it held.
func (ps *processes) killAll() {
	ps.left = nil
	if ps.cgroup != nil && !ps.escaped {
		if empty, err := ps.cgroup.Empty(); err == nil && empty {
			ps.forget()
			return
		}
	}
	if ps.adopts && proctree.Childless() {
		ps.forget() // as after most jobs; a hunt reads the whole process table
		return
	}
	t := proctree.Target{Marker: ps.marker, Reaper: ps.own(), Cgroup: ps.cgroup}
	if ps.dedicated {
		if self, err := proctree.Self(); err == nil {
			t.Root, t.SpareRoot = self, true
		}
	}
	ps.hunt(t)
	for _, id := range ps.running {
		// Where there is no marker, the groups of the steps are what is known. A
		// group's number is not given to another process while it has members.
		if p, err := proctree.Lookup(id.PID); err != nil || p.ID == id {
			_ = syscall.Kill(-id.PID, syscall.SIGKILL)
		}
	}
	ps.forget()
}

func (ps *processes) forget() {
	closeAll(ps.pipes...)
	ps.discards.Wait()
	ps.pipes, ps.running = nil, nil
}

func (ps *processes) hunt(t proctree.Target) {
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	if err := proctree.KillAll(ctx, t); err != nil {
		ps.left = &leftError{err}
		ps.log.Error("processes of the job are left", "error", err)
	}
}
