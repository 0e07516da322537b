package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
)

// Reconnecting: quick at first, since an orchestrator that restarts is back
// within a second, and never slower than the limit.
const (
	retryFirst = 50 * time.Millisecond
	retryLimit = 10 * time.Second
	// returnLimit is the longest pause of an agent that has lost its server: a
	// job's log stands still as long when the server is back.
	returnLimit = 2 * time.Second
)

// An agent is one Run.
type agent struct {
	cfg      Config
	log      *slog.Logger
	contacts *contacts
	gitPath  string // empty where there is none
	adopts   bool   // orphans of the job become its children

	jobCtx context.Context // of the job: ends with Run
	stop   context.CancelCauseFunc

	// Told at enrolment, fixed from then on.
	credential string
	machineID  string
	heartbeat  time.Duration
	deadline   time.Duration
	maxBatch   int

	mu      sync.Mutex
	contact time.Time // last sign of the server, monotonic
	att     *attempt
}

// attempt is the one job of an agent.
type attempt struct {
	id      string
	epoch   int64 // under agent.mu
	journal *journal
	cancel  chan cancelRequest // one is enough
	ended   chan struct{}      // closed when the job's goroutine is gone
	left    error              // processes that could not be killed; valid once ended
}

type cancelRequest struct {
	grace  time.Duration
	reason string
}

// Run enrols, runs the job that the server assigns and returns nil once its end
// is acknowledged. It fails with an error that wraps ErrConfig, ErrEnroll,
// ErrDismissed, ErrDeadline, ErrProtocol or ErrPanic, or with ctx's cause when
// ctx ends; the job is killed at once in all these cases. When Run has returned,
// nothing of the job is left, neither processes nor files; where that did not
// work the error says so.
func Run(ctx context.Context, cfg Config) error {
	cfg, err := cfg.complete()
	if err != nil {
		return err
	}
	if err := prepareDirs(cfg); err != nil {
		return err
	}
	a := &agent{cfg: cfg, log: cfg.Logger, contact: time.Now()}
	a.contacts = &contacts{log: a.log, list: cfg.Contacts}
	// Looked for where the steps will look: this process's own search path may
	// be empty. Where there is none the source comes as a tar.
	a.gitPath, _ = lookPath("git", cfg.Env["PATH"])
	if cfg.Dedicated {
		a.adopts = becomeReaper(a.log)
	}
	ctx, a.stop = context.WithCancelCause(ctx)
	defer a.stop(nil)
	a.jobCtx = ctx
	var conn clientConn
	if err := a.guard(func() (err error) { conn, err = a.enroll(ctx); return err }); err != nil {
		return err
	}
	if cfg.TokenFile != "" {
		if err := os.Remove(cfg.TokenFile); err != nil && !errors.Is(err, os.ErrNotExist) {
			a.log.Warn("token file stays", "error", err)
		}
	}

	watched := make(chan struct{})
	a.spawn(func() { defer close(watched); a.watchDeadline(ctx) })
	err = a.guard(func() error { return a.serve(ctx, conn) })
	a.stop(err)
	<-watched
	a.mu.Lock()
	att := a.att
	a.mu.Unlock()
	if att != nil {
		<-att.ended
		err = errors.Join(err, att.left, att.journal.remove())
	}
	return errors.Join(err, cleanDirs(cfg))
}

// prepareDirs makes the directories, and refuses a work tree that is somebody's.
func prepareDirs(cfg Config) error {
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("%w: state directory: %w", ErrConfig, err)
	}
	if err := os.MkdirAll(cfg.WorkDir, 0o755); err != nil {
		return fmt.Errorf("%w: work directory: %w", ErrConfig, err)
	}
	entries, err := os.ReadDir(cfg.WorkDir)
	if err != nil {
		return fmt.Errorf("%w: work directory: %w", ErrConfig, err)
	}
	if len(entries) > 0 {
		return fmt.Errorf("%w: work directory %s is not empty, and would be deleted at the end", ErrConfig, cfg.WorkDir)
	}
	return nil
}

func (c Config) spoolDir() string { return filepath.Join(c.StateDir, "journal") }
func (c Config) stepsDir() string { return filepath.Join(c.StateDir, "steps") }

func cleanDirs(cfg Config) error {
	return errors.Join(removeTree(cfg.WorkDir), removeTree(cfg.stepsDir()))
}

// enroll exchanges the token for a credential. The connection it was told on is
// kept for the first session: a handshake costs a second in an emulated guest.
func (a *agent) enroll(ctx context.Context) (clientConn, error) {
	nonce := make([]byte, 16)
	_, _ = rand.Read(nonce) // never fails
	req := &agentv1.EnrollRequest{
		Token: a.cfg.Token, Nonce: nonce, Os: runtime.GOOS, Arch: runtime.GOARCH, Version: a.cfg.Version,
		ProtocolMin: int32(a.cfg.ProtocolMin), ProtocolMax: int32(a.cfg.ProtocolMax), HasGit: a.gitPath != "",
	}
	ctx, cancel := context.WithTimeoutCause(ctx, a.cfg.Patience,
		fmt.Errorf("no answer within %s", a.cfg.Patience))
	defer cancel()
	retry := backoff{first: retryFirst, limit: retryLimit}
	var last error // one that says more than that the time is over, if there was one
	for {
		contact := a.contacts.current()
		conn, resp, err := a.enrollAt(ctx, contact, req)
		if err == nil {
			if err := a.enrolled(resp); err != nil {
				_ = conn.Close()
				return nil, err
			}
			a.log.Info("enrolled", "contact", contact, "machine", a.machineID, "protocol", resp.GetProtocol())
			return conn, nil
		}
		switch status.Code(err) {
		case codes.Unauthenticated, codes.FailedPrecondition:
			return nil, fmt.Errorf("%w: %s: %w", ErrEnroll, contact, err)
		}
		a.log.Warn("enrolment failed, trying again", "contact", contact, "error", err)
		a.contacts.next()
		if last == nil || status.Code(err) != codes.DeadlineExceeded {
			last = fmt.Errorf("last from %s: %w", contact, err)
		}
		if werr := retry.wait(ctx); werr != nil {
			return nil, fmt.Errorf("%w: %w; %w", ErrEnroll, werr, last)
		}
	}
}

func (a *agent) enrollAt(ctx context.Context, contact string, req *agentv1.EnrollRequest) (clientConn, *agentv1.EnrollResponse, error) {
	conn, err := a.dial(contact)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*connectTimeout)
	defer cancel()
	resp, err := agentv1.NewAgentServiceClient(conn).Enroll(ctx, req)
	if err != nil {
		_ = conn.Close()
		return nil, nil, err
	}
	return conn, resp, nil
}

func (a *agent) enrolled(r *agentv1.EnrollResponse) error {
	if p := int(r.GetProtocol()); p < a.cfg.ProtocolMin || p > a.cfg.ProtocolMax {
		return fmt.Errorf("%w: the server chose version %d, offered were %d to %d",
			ErrProtocol, p, a.cfg.ProtocolMin, a.cfg.ProtocolMax)
	}
	if r.GetSessionCredential() == "" || r.GetMachineId() == "" {
		return fmt.Errorf("%w: enrolment without credential or machine", ErrProtocol)
	}
	a.credential, a.machineID = r.GetSessionCredential(), r.GetMachineId()
	a.heartbeat = orDefault(r.GetHeartbeatInterval().AsDuration(), 5*time.Second)
	a.deadline = orDefault(r.GetAgentDeadline().AsDuration(), 10*time.Minute)
	a.maxBatch = int(r.GetMaxEventBytes())
	a.contacts.replace(r.GetContacts())
	a.seen()
	return nil
}

func orDefault(d, def time.Duration) time.Duration {
	if d <= 0 {
		return def
	}
	return d
}

// seen notes a sign of life from the server.
func (a *agent) seen() {
	a.mu.Lock()
	a.contact = time.Now()
	a.mu.Unlock()
}

// watchDeadline ends everything when the server has been silent for the agent
// deadline, or has not acknowledged the job's end for as long.
func (a *agent) watchDeadline(ctx context.Context) {
	t := time.NewTicker(max(a.deadline/50, time.Millisecond))
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		a.mu.Lock()
		silent := time.Since(a.contact)
		att := a.att
		a.mu.Unlock()
		switch {
		case silent >= a.deadline:
			a.log.Error("no contact for the agent deadline: giving up", "deadline", a.deadline)
			a.stop(fmt.Errorf("%w: silent for %s", ErrDeadline, a.deadline))
			return
		case att != nil && att.journal.idle() >= a.deadline:
			a.log.Error("the job's end is not acknowledged: giving up", "deadline", a.deadline)
			a.stop(fmt.Errorf("%w: the job's end is not acknowledged", ErrDeadline))
			return
		}
	}
}

// serve keeps a session open until the job is over, ctx ends or the server
// dismisses the agent. It closes conn.
func (a *agent) serve(ctx context.Context, conn clientConn) error {
	retry := backoff{first: retryFirst, limit: min(returnLimit, max(a.deadline/20, retryFirst))}
	for {
		contact := a.contacts.current()
		var err error
		if conn == nil {
			conn, err = a.dial(contact)
		}
		if err == nil {
			var s *session
			s, err = a.attach(ctx, conn)
			if s.welcomed {
				retry.reset()
			}
		}
		conn = nil
		switch {
		case a.finished():
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, ErrProtocol), errors.Is(err, errCorrupt):
			return err
		case status.Code(err) == codes.Unauthenticated, status.Code(err) == codes.FailedPrecondition:
			return fmt.Errorf("%w: %w", ErrDismissed, err)
		}
		a.log.Info("connection lost, reconnecting", "contact", contact, "error", err)
		a.contacts.next()
		if err := retry.wait(ctx); err != nil {
			return err
		}
	}
}

// finished reports whether the end of the job is acknowledged.
func (a *agent) finished() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.att == nil {
		return false
	}
	select {
	case <-a.att.journal.done:
		return true
	default:
		return false
	}
}
