package solstice_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
)

// guest is an agent that the test plays by hand, from what a machine is given.
type guest struct {
	t    *testing.T
	boot vmprovider.Bootstrap
	rpc  agentv1.AgentServiceClient
	web  *http.Client
	cred string
}

func newGuest(t *testing.T, b vmprovider.Bootstrap) *guest {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b.CA) {
		t.Fatal("no CA in the bootstrap")
	}
	cfg := &tls.Config{RootCAs: pool, ServerName: agent.ServerName, MinVersion: tls.VersionTLS13}
	conn, err := grpc.NewClient(b.Contacts[0], grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	transport := &http.Transport{TLSClientConfig: cfg}
	t.Cleanup(transport.CloseIdleConnections)
	return &guest{t: t, boot: b, rpc: agentv1.NewAgentServiceClient(conn), web: &http.Client{Transport: transport}}
}

func (g *guest) enroll(token string, nonce byte) (*agentv1.EnrollResponse, error) {
	ctx, cancel := context.WithTimeout(g.t.Context(), 10*time.Second)
	defer cancel()
	return g.rpc.Enroll(ctx, &agentv1.EnrollRequest{
		Token: token, Nonce: bytes.Repeat([]byte{nonce}, 16), Os: "linux", Arch: "amd64", ProtocolMin: 1, ProtocolMax: 1,
	})
}

// attach opens a session with a credential and returns what the server
// answers to hello first, with a function that ends the session.
func (g *guest) attach(cred string, hello *agentv1.Hello) (agentv1.AgentService_AttachClient, *agentv1.AttachResponse, error) {
	ctx, cancel := context.WithTimeout(g.t.Context(), 30*time.Second)
	g.t.Cleanup(cancel)
	if cred != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+cred)
	}
	s, err := g.rpc.Attach(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := s.Send(&agentv1.AttachRequest{Msg: &agentv1.AttachRequest_Hello{Hello: hello}}); err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	first, err := s.Recv()
	return s, first, err
}

func (g *guest) source(cred, attempt string) int {
	g.t.Helper()
	req, err := http.NewRequestWithContext(g.t.Context(), http.MethodGet, "https://"+g.boot.Contacts[0]+"/git/"+attempt+"/info/refs?service=git-upload-pack", nil)
	if err != nil {
		g.t.Fatal(err)
	}
	if cred != "" {
		req.Header.Set("Authorization", "Bearer "+cred)
	}
	resp, err := g.web.Do(req)
	if err != nil {
		g.t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	return resp.StatusCode
}

// TestIdentity plays agents that are not who they say: only the credential
// counts, and it opens one attempt, as long as that is under way. Every RPC of
// the service has a row, so that a new one without a row fails here.
func TestIdentity(t *testing.T) { onBoth(t, testIdentity) }

func testIdentity(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	boots := make(chan vmprovider.Bootstrap, 8)
	hypervisor := memvm.New(memvm.Config{Script: func(s vmprovider.Spec) memvm.Script { boots <- s.Bootstrap; return memvm.Script{} }})
	eng, _ := p.start(t, func(c *solstice.Config) { c.Pools[0].Provider = hypervisor })
	r := p.submit(t, eng, "jobs:\n  a: { steps: [ { run: 'true' } ] }\n  b: { steps: [ { run: 'true' } ] }\n")
	one, other := newGuest(t, <-boots), newGuest(t, <-boots)

	covered := map[string]bool{}
	want := func(rpc, what string, err error, code codes.Code) {
		t.Helper()
		covered[rpc] = true
		if status.Code(err) != code {
			t.Errorf("%s, %s: %v, want %s", rpc, what, err, code)
		}
	}

	_, err := one.enroll("wrong", 1)
	want("Enroll", "unknown token", err, codes.Unauthenticated)
	_, err = one.rpc.Enroll(t.Context(), &agentv1.EnrollRequest{Token: one.boot.Token, Nonce: make([]byte, 16), ProtocolMin: 1, ProtocolMax: 1})
	want("Enroll", "no deadline", err, codes.InvalidArgument)
	lost, err := one.enroll(one.boot.Token, 1)
	want("Enroll", "first use", err, codes.OK)
	again, err := one.enroll(one.boot.Token, 1)
	want("Enroll", "the same agent, whose reply was lost", err, codes.OK)
	one.cred = again.GetSessionCredential()
	// A refusal for the protocol ends the attempt: not with a token that is
	// unknown, or used.
	for _, token := range []string{"wrong", one.boot.Token} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err = one.rpc.Enroll(ctx, &agentv1.EnrollRequest{Token: token, Nonce: make([]byte, 16), ProtocolMin: 7, ProtocolMax: 9})
		want("Enroll", "protocol of the future without a token of its own", err, codes.Unauthenticated)
	}
	_, err = other.enroll(one.boot.Token, 2)
	want("Enroll", "a token read from another's seed", err, codes.Unauthenticated)
	reply, err := other.enroll(other.boot.Token, 3)
	want("Enroll", "the second machine", err, codes.OK)
	other.cred = reply.GetSessionCredential()

	_, _, err = one.attach("", &agentv1.Hello{})
	want("Attach", "no credential", err, codes.Unauthenticated)
	_, _, err = one.attach("nonsense", &agentv1.Hello{})
	want("Attach", "unknown credential", err, codes.Unauthenticated)
	_, _, err = one.attach(one.boot.Token, &agentv1.Hello{})
	want("Attach", "the token as a credential", err, codes.Unauthenticated)
	_, _, err = one.attach(lost.GetSessionCredential(), &agentv1.Hello{})
	want("Attach", "the credential that a later enrolment replaced", err, codes.Unauthenticated)

	session, _, err := one.attach(one.cred, &agentv1.Hello{})
	want("Attach", "the agent itself", err, codes.OK)
	m := assignment(t, session)
	mine := m.GetAssign().GetAttemptId()
	_, _, err = other.attach(other.cred, &agentv1.Hello{AttemptId: mine})
	want("Attach", "another's attempt", err, codes.FailedPrecondition)

	if got := one.source(one.cred, mine); got != http.StatusOK {
		t.Errorf("source of the own attempt: %d", got)
	}
	for what, cred := range map[string]string{"another's credential": other.cred, "none": "", "the token": one.boot.Token} {
		if got := one.source(cred, mine); got != http.StatusNotFound {
			t.Errorf("source with %s: %d", what, got)
		}
	}

	// A journal for an attempt that is over, or after a take-over, is refused.
	send := func(s agentv1.AgentService_AttachClient, m *agentv1.AttachRequest) error {
		if err := s.Send(m); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		for {
			if _, err := s.Recv(); err != nil {
				return err
			}
		}
	}
	_, _, err = one.attach(one.cred, &agentv1.Hello{AttemptId: mine})
	want("Attach", "the same agent on a new stream", err, codes.OK)
	want("Attach", "the stream that the new one replaced", send(session, &agentv1.AttachRequest{Msg: &agentv1.AttachRequest_Heartbeat{Heartbeat: &agentv1.Heartbeat{}}}), codes.Aborted)

	if err := eng.Cancel(t.Context(), r.ID, "enough"); err != nil {
		t.Fatal(err)
	}
	// The hand-played agents never answer; the server ends the attempts.
	if r = finish(t, eng, r.ID); r.State != solstice.RunCancelled {
		t.Errorf("run is %s", r.State)
	}
	_, _, err = one.attach(one.cred, &agentv1.Hello{AttemptId: mine})
	if c := status.Code(err); c != codes.Unauthenticated && c != codes.FailedPrecondition {
		t.Errorf("attach after the end: %v", err)
	}
	_, err = one.enroll(one.boot.Token, 1)
	want("Enroll", "after the end", err, codes.Unauthenticated)
	if got := one.source(one.cred, mine); got != http.StatusNotFound {
		t.Errorf("source after the end: %d", got)
	}
	eventually(t, "the machines are destroyed", func() bool { return hypervisor.Hypervisor().Len() == 0 })

	for _, m := range agentv1.AgentService_ServiceDesc.Methods {
		if !covered[m.MethodName] {
			t.Errorf("no row for %s", m.MethodName)
		}
	}
	for _, s := range agentv1.AgentService_ServiceDesc.Streams {
		if !covered[s.StreamName] {
			t.Errorf("no row for %s", s.StreamName)
		}
	}
}

// assignment is the first one that comes; contacts may come before it.
func assignment(t *testing.T, session agentv1.AgentService_AttachClient) *agentv1.AttachResponse {
	t.Helper()
	for {
		m, err := session.Recv()
		if err != nil {
			t.Fatalf("no assignment: %v", err)
		}
		if m.GetAssign() != nil {
			return m
		}
		if m.GetContacts() == nil {
			t.Fatalf("no assignment, but %v", m)
		}
	}
}
