package solstice_test

import (
	"encoding/json"
	"errors"
	"io"
	"math"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
)

// TestHostileJournal plays an agent whose journal is well-formed and malicious:
// text that no database holds, times out of any calendar, more events than
// bytes. What it says is recorded as far as it can be, and its run ends.
func TestHostileJournal(t *testing.T) {
	t.Run("sqlite", func(t *testing.T) { hostileJournal(t, testenv.SQLite(t)) })
	t.Run("postgres", func(t *testing.T) { hostileJournal(t, testenv.Postgres(t)) })
}

// patient has an agent that the test plays by hand answer in its own time.
func patient(p *plant) {
	p.Timing.Heartbeat, p.Timing.AgentDeadline = 20*time.Second, time.Minute
}

func hostileJournal(t *testing.T, dbURL string) {
	p := newPlant(t, dbURL)
	patient(p)
	boots := make(chan vmprovider.Bootstrap, 8)
	hypervisor := memvm.New(memvm.Config{Script: func(s vmprovider.Spec) memvm.Script { boots <- s.Bootstrap; return memvm.Script{} }})
	eng, _ := p.start(t, func(c *solstice.Config) { c.Pools[0].Provider = hypervisor })
	r := p.submit(t, eng, "jobs:\n  a: { checkout: false, steps: [ { run: 'true' } ] }\n")
	g := newGuest(t, <-boots)
	reply, err := g.enroll(g.boot.Token, 1)
	if err != nil {
		t.Fatal(err)
	}
	session, _, err := g.attach(reply.GetSessionCredential(), &agentv1.Hello{})
	if err != nil {
		t.Fatal(err)
	}
	m := assignment(t, session)
	attempt := m.GetAssign().GetAttemptId()
	send := func(m *agentv1.AttachRequest) {
		t.Helper()
		if err := session.Send(m); err != nil && !errors.Is(err, io.EOF) { // of which Recv knows the reason
			t.Fatal(err)
		}
	}
	confirm := &agentv1.AttachRequest{Msg: &agentv1.AttachRequest_AssignConfirm{AssignConfirm: &agentv1.AssignConfirm{AttemptId: attempt}}}
	events := func(es ...*agentv1.Event) *agentv1.AttachRequest {
		return &agentv1.AttachRequest{Msg: &agentv1.AttachRequest_Events{Events: &agentv1.EventBatch{Events: es}}}
	}
	send(confirm)
	send(events(make([]*agentv1.Event, 20_000)...)) // 40 kB
	for err == nil {
		_, err = session.Recv()
	}
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("a flood of empty events: %v", err)
	}

	session, _, err = g.attach(reply.GetSessionCredential(), &agentv1.Hello{AttemptId: attempt})
	if err != nil {
		t.Fatal(err)
	}
	nul := "a\x00b"
	send(events(
		&agentv1.Event{Seq: 1, TimeMicros: math.MinInt64, Event: &agentv1.Event_StepStarted{StepStarted: &agentv1.StepStarted{}}},
		&agentv1.Event{Seq: 2, TimeMicros: math.MaxInt64, Event: &agentv1.Event_Log{Log: &agentv1.Log{Data: []byte(nul)}}},
		&agentv1.Event{Seq: 3, TimeMicros: math.MaxInt64, Event: &agentv1.Event_StepFinished{StepFinished: &agentv1.StepFinished{
			Result: agentv1.Result_RESULT_FAILED, Reason: nul, Signal: nul, Outputs: map[string]string{nul: nul},
		}}},
		&agentv1.Event{Seq: 4, Event: &agentv1.Event_Truncated{Truncated: &agentv1.Truncated{From: -1, To: math.MinInt64, Reason: nul}}},
		&agentv1.Event{Seq: 5, TimeMicros: math.MaxInt64, Event: &agentv1.Event_JobFinished{JobFinished: &agentv1.JobFinished{
			Result: agentv1.Result_RESULT_FAILED, Reason: nul, Outputs: map[string]string{nul: nul}, LogSize: int64(len(nul)),
		}}},
	))
	for m, err = session.Recv(); err == nil && m.GetAck().GetSeq() < 5; m, err = session.Recv() {
	}
	if err != nil {
		t.Fatalf("the journal was not acknowledged: %v", err)
	}
	if r = finish(t, eng, r.ID); r.State != solstice.RunFailed {
		t.Errorf("run is %s: %s", r.State, r.Reason)
	}
	steps, err := eng.Steps(t.Context(), attempt)
	if err != nil || len(steps) != 1 {
		t.Fatalf("steps: %v, %v", steps, err)
	}
	if _, err := json.Marshal(steps); err != nil {
		t.Errorf("what people ask for cannot be told: %v", err)
	}
	if s := steps[0]; s.StartedAt.Before(r.CreatedAt.AddDate(0, 0, -2)) || s.FinishedAt.After(r.CreatedAt.AddDate(0, 0, 3)) {
		t.Errorf("the step ran from %s to %s", s.StartedAt, s.FinishedAt)
	}
	for c, err := range eng.Log(t.Context(), attempt, 0) {
		if err != nil {
			t.Error(err)
		} else if _, err := json.Marshal(c); err != nil {
			t.Errorf("the log cannot be told: %v", err)
		}
	}
	eventually(t, "the machine is destroyed", func() bool { return hypervisor.Hypervisor().Len() == 0 })
}
