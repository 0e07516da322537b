package agent_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
)

// numbers prints lines whose content is known.
func numbers(n int) (run string, log []byte) {
	var b bytes.Buffer
	for i := 1; i <= n; i++ {
		fmt.Fprintf(&b, "line %d of the test\n", i)
	}
	return fmt.Sprintf(`i=1; awk 'BEGIN { for (i = 1; i <= %d; i++) printf "line %%d of the test\n", i }'`, n), b.Bytes()
}

func checkLog(t *testing.T, s *server, want []byte) {
	t.Helper()
	if got := s.logText(); got != string(want) {
		t.Errorf("log of %d bytes differs from the %d printed", len(got), len(want))
	}
}

// TestCutConnections: the connection breaks every 64 KiB and nothing is lost.
func TestCutConnections(t *testing.T) {
	s := newServer(t)
	s.maxBatch = 16 << 10
	s.cutEvery = 64 << 10
	run, log := numbers(40_000)
	s.spec = jobOf(script(run), script("echo end"))
	checkResult(t, s.run(), succeeded, classNone)
	checkLog(t, s, append(log, "end\n"...))
	if s.sessions < 10 {
		t.Errorf("only %d sessions: the fault did not happen", s.sessions)
	}
}

// TestDroppedAcks: unacknowledged events come again after a reconnect.
func TestDroppedAcks(t *testing.T) {
	s := newServer(t)
	s.ack = func(ses *session, seq int64) bool {
		if ses.n%2 == 0 || ses.n > 10 {
			return true
		}
		if ses.events > 0 {
			ses.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Drain{Drain: &agentv1.Drain{}}})
		}
		return false
	}
	s.onHello = func(_ *session, h *agentv1.Hello) *agentv1.Welcome {
		if h.GetFirstSpooledSeq() == 0 {
			return nil
		}
		return &agentv1.Welcome{Epoch: 1, AckedSeq: h.GetFirstSpooledSeq() - 1} // as if all it stored were lost
	}
	run, log := numbers(30_000)
	s.spec = jobOf(script(run))
	checkResult(t, s.run(), succeeded, classNone)
	checkLog(t, s, log)
	if s.repeats == 0 {
		t.Error("nothing was sent twice: the fault did not happen")
	}
}

// TestRepeatedAssign: the job starts once however often it is assigned.
func TestRepeatedAssign(t *testing.T) {
	s := newServer(t)
	s.reassign = true
	s.cutEvery = 64 << 10
	run, log := numbers(20_000)
	s.spec = jobOf(script(run))
	checkResult(t, s.run(), succeeded, classNone)
	checkLog(t, s, log)
	if s.confirmed < 2 {
		t.Errorf("confirmed %d times", s.confirmed)
	}
}

// TestForeignAssign: an agent serves one attempt.
func TestForeignAssign(t *testing.T) {
	s := newServer(t)
	s.spec = jobOf(script("echo once"))
	s.onStart = func(ses *session) {
		other := s.assignment()
		other.GetAssign().AttemptId = "attempt-2"
		other.GetAssign().JobSpec = jobOf(script("echo twice"))
		ses.send(other)
	}
	checkResult(t, s.run(), succeeded, classNone)
	checkLog(t, s, []byte("once\n"))
}

// TestStaleEpoch: an orchestrator that lost the attempt is not believed, a new
// owner is.
func TestStaleEpoch(t *testing.T) {
	s := newServer(t)
	s.cutEvery = 64 << 10
	s.epoch.Store(5)
	var stale, told atomic.Int32
	s.onHello = func(ses *session, h *agentv1.Hello) *agentv1.Welcome {
		if h.GetAttemptId() == "" {
			return nil
		}
		if stale.Add(1) == 1 {
			return &agentv1.Welcome{Epoch: 4, AckedSeq: 0}
		}
		s.epoch.Add(1)
		if h.GetEpoch() >= 6 {
			told.Add(1)
		}
		return nil
	}
	run, log := numbers(20_000)
	s.spec = jobOf(script(run))
	checkResult(t, s.run(), succeeded, classNone)
	checkLog(t, s, log)
	if told.Load() == 0 {
		t.Error("the agent never told the new epoch back")
	}
}

// TestStalledServer: a server that takes everything and answers nothing is left.
func TestStalledServer(t *testing.T) {
	s := newServer(t)
	s.heartbeat = 50 * time.Millisecond
	s.onMessage = func(ses *session, m *agentv1.AttachRequest) bool {
		if ses.n > 1 || m.GetEvents() == nil {
			return false
		}
		<-ses.ctx.Done() // reads nothing more
		return true
	}
	run, log := numbers(30_000)
	s.spec = jobOf(script(run))
	checkResult(t, s.run(), succeeded, classNone)
	checkLog(t, s, log)
	if s.sessions < 2 {
		t.Error("the agent stayed with a silent server")
	}
}

// TestDrain: the agent goes elsewhere and comes back.
func TestDrain(t *testing.T) {
	s := newServer(t)
	cfg := s.config()
	s.onStart = func(ses *session) {
		if ses.n < 4 {
			ses.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Drain{Drain: &agentv1.Drain{}}})
			return
		}
		must(t, os.WriteFile(filepath.Join(cfg.WorkDir, "go"), nil, 0o600))
	}
	s.spec = jobOf(script("while [ ! -e go ]; do sleep 0.01; done"))
	must(t, s.runConfig(cfg))
	checkResult(t, s.verdict(), succeeded, classNone)
	if s.sessions != 4 {
		t.Errorf("%d sessions", s.sessions)
	}
}

// TestContactList: a second endpoint is told on the stream and used.
func TestContactList(t *testing.T) {
	a, b := newServer(t), newServer(t)
	b.ca = a.ca
	relay := relayTo(t, a.addr)
	a.onStart = func(ses *session) {
		ses.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Contacts{Contacts: &agentv1.ContactList{
			Contacts: []string{"no port", relay.addr},
		}}})
		if ses.n == 1 {
			ses.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Drain{Drain: &agentv1.Drain{}}})
		}
	}
	a.spec = jobOf(script("echo done"))
	checkResult(t, a.run(), succeeded, classNone)
	if relay.conns.Load() == 0 {
		t.Error("the new contact was not used")
	}
}

// TestDismissed: the attempt is over for the server; the job is killed.
func TestDismissed(t *testing.T) {
	for _, code := range []codes.Code{codes.Unauthenticated, codes.FailedPrecondition} {
		t.Run(code.String(), func(t *testing.T) {
			s := newServer(t)
			s.attachErr = func(n int) error {
				if n > 1 {
					return status.Error(code, "over")
				}
				return nil
			}
			s.spec = jobOf(script("echo ready; sleep 1000"), when("always()", script("echo unwanted")))
			s.onEvent = func(ses *session, e *agentv1.Event) {
				if e.GetLog() != nil {
					ses.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Drain{Drain: &agentv1.Drain{}}})
				}
			}
			if err := s.runConfig(s.config()); !errors.Is(err, agent.ErrDismissed) {
				t.Errorf("Run: %v", err)
			}
			nothingLeft(t)
		})
	}
}

// TestImpossibleResume: a server that forgot, or knows more than there is, ends
// the agent.
func TestImpossibleResume(t *testing.T) {
	for name, seq := range map[string]int64{"forgot": 0, "invents": 1 << 40} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.spec = jobOf(script("echo ready; sleep 1000"))
			s.onEvent = func(ses *session, e *agentv1.Event) {
				if e.GetLog() != nil {
					// The ack of the first event is on its way before this.
					ses.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Ack{Ack: &agentv1.Ack{Seq: 1}}})
					ses.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Drain{Drain: &agentv1.Drain{}}})
				}
			}
			s.onHello = func(ses *session, h *agentv1.Hello) *agentv1.Welcome {
				if h.GetAttemptId() == "" {
					return nil
				}
				return &agentv1.Welcome{Epoch: 1, AckedSeq: seq}
			}
			if err := s.runConfig(s.config()); !errors.Is(err, agent.ErrProtocol) {
				t.Errorf("Run: %v", err)
			}
			nothingLeft(t)
		})
	}
}

// TestDeadline: nobody answers any more; the job is killed at the deadline.
func TestDeadline(t *testing.T) {
	s := newServer(t)
	s.deadline = time.Second
	s.heartbeat = 50 * time.Millisecond
	relay := relayTo(t, s.addr)
	s.spec = jobOf(script("echo ready; sleep 1000"))
	s.onEvent = func(_ *session, e *agentv1.Event) {
		if e.GetLog() != nil {
			go relay.close()
		}
	}
	cfg := s.config()
	cfg.Contacts = []string{relay.addr}
	if err := s.runConfig(cfg); !errors.Is(err, agent.ErrDeadline) {
		t.Errorf("Run: %v", err)
	}
	nothingLeft(t)
}

// TestUnacknowledgedEnd: a server that answers but never acknowledges the end
// does not keep the machine for ever.
func TestUnacknowledgedEnd(t *testing.T) {
	s := newServer(t)
	s.deadline = time.Second
	s.heartbeat = 50 * time.Millisecond
	s.ack = func(*session, int64) bool { return false }
	s.onHello = func(*session, *agentv1.Hello) *agentv1.Welcome { // nor after a reconnect
		return &agentv1.Welcome{Epoch: s.epoch.Load()}
	}
	s.spec = jobOf(script("echo done"))
	if err := s.runConfig(s.config()); !errors.Is(err, agent.ErrDeadline) {
		t.Errorf("Run: %v", err)
	}
	s.verdict()
}

func TestEnroll(t *testing.T) {
	t.Run("through the contacts, with one nonce", func(t *testing.T) {
		s := newServer(t)
		s.enrollErr = func(n int) error {
			if n < 3 {
				return status.Error(codes.Unavailable, "not now")
			}
			return nil
		}
		dead, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		must(t, dead.Close())
		s.spec = jobOf(script("echo done"))
		cfg := s.config()
		cfg.Contacts = []string{dead.Addr().String(), s.addr}
		must(t, s.runConfig(cfg))
		if len(s.nonces) != 3 || !bytes.Equal(s.nonces[0], s.nonces[2]) {
			t.Errorf("nonces %x", s.nonces)
		}
	})
	for _, code := range []codes.Code{codes.Unauthenticated, codes.FailedPrecondition} {
		t.Run("refused "+code.String(), func(t *testing.T) {
			s := newServer(t)
			s.enrollErr = func(int) error { return status.Error(code, "final") }
			if err := s.runConfig(s.config()); !errors.Is(err, agent.ErrEnroll) || status.Code(errors.Unwrap(err)) == codes.OK && s.enrolls != 1 {
				t.Errorf("Run: %v after %d calls", err, s.enrolls)
			}
			if s.enrolls != 1 {
				t.Errorf("%d calls", s.enrolls)
			}
		})
	}
	t.Run("patience ends", func(t *testing.T) {
		s := newServer(t)
		s.enrollErr = func(int) error { return status.Error(codes.Unavailable, "never") }
		cfg := s.config()
		cfg.Patience = 300 * time.Millisecond
		if err := s.runConfig(cfg); !errors.Is(err, agent.ErrEnroll) || !strings.Contains(err.Error(), "never") {
			t.Errorf("Run: %v", err)
		}
	})
	t.Run("protocol", func(t *testing.T) {
		s := newServer(t)
		s.protocol = 99
		if err := s.runConfig(s.config()); !errors.Is(err, agent.ErrProtocol) {
			t.Errorf("Run: %v", err)
		}
	})
	t.Run("endpoint of another CA", func(t *testing.T) {
		s := newServer(t)
		s.ca, _ = makeCert(t)
		cfg := s.config()
		cfg.Patience = 300 * time.Millisecond
		if err := s.runConfig(cfg); !errors.Is(err, agent.ErrEnroll) || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("Run: %v", err)
		}
		if s.enrolls != 0 {
			t.Error("the token went to an endpoint that was not verified")
		}
	})
}

// relay forwards connections until it is closed.
type relay struct {
	addr  string
	conns atomic.Int32
	close func()
}

func relayTo(t *testing.T, target string) *relay {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	r := &relay{addr: ln.Addr().String()}
	r.close = startRelay(ln, target, &r.conns)
	t.Cleanup(r.close)
	return r
}
