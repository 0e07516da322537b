package solstice_test

import (
	"crypto/sha256"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
)

// TestSlotOfAnotherEngine: an agent whose machine one engine made attaches to
// another, which ends its job. The first has its slot back.
func TestSlotOfAnotherEngine(t *testing.T) {
	p := newPlant(t, testenv.Postgres(t))
	p.Capacity = 1
	patient(p)
	boots := make(chan vmprovider.Bootstrap, 8)
	hypervisor := memvm.New(memvm.Config{Script: func(s vmprovider.Spec) memvm.Script { boots <- s.Bootstrap; return memvm.Script{} }})
	first, _ := p.start(t, func(c *solstice.Config) { c.Pools[0].Provider = hypervisor })
	second, _ := p.start(t, func(c *solstice.Config) {
		c.Pools[0].Labels, c.Pools[0].Name, c.Pools[0].Host = []string{"other"}, "other", "other"
	})
	r := p.submit(t, first, "jobs:\n  a: { checkout: false, steps: [ { run: 'true' } ] }\n")
	b := <-boots
	b.Contacts = []string{second.AgentAddr()}
	g := newGuest(t, b)
	reply, err := g.enroll(g.boot.Token, 1)
	if err != nil {
		t.Fatal(err)
	}
	session, _, err := g.attach(reply.GetSessionCredential(), &agentv1.Hello{})
	if err != nil {
		t.Fatal(err)
	}
	m := assignment(t, session)
	for _, m := range []*agentv1.AttachRequest{
		{Msg: &agentv1.AttachRequest_AssignConfirm{AssignConfirm: &agentv1.AssignConfirm{AttemptId: m.GetAssign().GetAttemptId()}}},
		{Msg: &agentv1.AttachRequest_Events{Events: &agentv1.EventBatch{Events: []*agentv1.Event{{
			Seq: 1, Event: &agentv1.Event_JobFinished{JobFinished: &agentv1.JobFinished{Result: agentv1.Result_RESULT_SUCCEEDED, LogSha256: emptySHA256[:]}},
		}}}}},
	} {
		if err := session.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	if r = finish(t, first, r.ID); r.State != solstice.RunSucceeded {
		t.Fatalf("run is %s: %s", r.State, r.Reason)
	}
	r = p.submit(t, first, "jobs:\n  b: { checkout: false, steps: [ { run: 'true' } ] }\n")
	select {
	case <-boots:
	case <-time.After(time.Minute):
		t.Error("the first engine claims nothing more")
	}
	if err := first.Cancel(t.Context(), r.ID, "enough"); err != nil {
		t.Fatal(err)
	}
	finish(t, first, r.ID)
	eventually(t, "the machines are destroyed", func() bool { return hypervisor.Hypervisor().Len() == 0 })
}

var emptySHA256 = sha256.Sum256(nil)
