package solstice_test

import (
	"slices"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
)

// TestPoolContacts: guests that reach the engine at addresses of their own hear
// of no others.
func TestPoolContacts(t *testing.T) {
	p := newPlant(t, testenv.SQLite(t))
	boots := make(chan vmprovider.Bootstrap, 1)
	vms := memvm.New(memvm.Config{Script: func(s vmprovider.Spec) memvm.Script { boots <- s.Bootstrap; return memvm.Script{} }})
	t.Cleanup(func() { _ = vms.Close() })
	want := []string{"10.0.2.2:50052", "10.0.2.2:50053"}
	eng, _ := p.start(t, func(c *solstice.Config) {
		c.RunnerURL = "http://engine/runner"
		c.Pools[0].Provider, c.Pools[0].Contacts, c.Pools[0].RunnerURL = vms, want, "http://10.0.2.2:8080/runner"
	})
	r := p.submit(t, eng, "jobs: { a: { steps: [ { run: 'true' } ] } }\n")
	boot := <-boots
	if !slices.Equal(boot.Contacts, want) || boot.RunnerURL != "http://10.0.2.2:8080/runner" {
		t.Errorf("bootstrap: %v, %s", boot.Contacts, boot.RunnerURL)
	}
	boot.Contacts = eng.Contacts() // where this guest is, in truth
	g := newGuest(t, boot)
	reply, err := g.enroll(boot.Token, 1)
	if err != nil || !slices.Equal(reply.GetContacts(), want) {
		t.Fatalf("enrolment: %v, %v", reply.GetContacts(), err)
	}
	stream, _, err := g.attach(reply.GetSessionCredential(), &agentv1.Hello{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil || !slices.Equal(m.GetContacts().GetContacts(), want) {
		t.Errorf("attached: %v, %v", m, err)
	}
	if err := eng.Cancel(t.Context(), r.ID, "over"); err != nil {
		t.Fatal(err)
	}
}
