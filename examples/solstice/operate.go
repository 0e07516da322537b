package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/solstice-ci/solstice-go/solstice"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/orchestrator/client"
)

// with dials and does something that may fail.
func (c *connection) with(ctx context.Context, what string, do func(*client.Client) error) error {
	cl, err := c.dial()
	if err != nil {
		return err
	}
	defer func() { _ = cl.Close() }()
	if err = do(cl); ctx.Err() != nil {
		return interrupted()
	}
	return c.explainOnce(what, err)
}

type poolsCmd struct {
	output
	connection
}

// Run is kong's.
func (c *poolsCmd) Run(e *env) error {
	return c.with(e.ctx, "cannot list pools", func(cl *client.Client) error {
		resp, err := cl.ListPools(e.ctx, &pb.ListPoolsRequest{})
		if err != nil {
			return err
		}
		pools := make([]solstice.PoolInfo, 0, len(resp.GetPools()))
		for _, p := range resp.GetPools() {
			pools = append(pools, solstice.PoolInfo{
				Name: p.GetName(), Labels: p.GetLabels(), Host: p.GetHost(), Orchestrator: p.GetOrchestrator(), Capacity: int(p.GetCapacity()),
				Machines: int(p.GetMachines()), Busy: int(p.GetBusy()), Warm: int(p.GetWarm()), Queued: p.GetQueued(), SeenAt: timeOf(p.GetSeenAt()),
				Ready: int(p.GetReady()), Booting: int(p.GetBooting()), Problem: p.GetProblem(),
			})
		}
		if c.JSON {
			return document(struct {
				Pools []solstice.PoolInfo `json:"pools"`
			}{pools})
		}
		out, t := c.screen(), table{}
		out.header(&t, "POOL", "LABELS", "HOST", "MACHINES", "BUSY", "READY", "QUEUED", "SEEN", "PROBLEM")
		for _, p := range pools {
			t.row(plain(p.Name), plain(strings.Join(p.Labels, ",")), plain(p.Host), fmt.Sprintf("%d/%d", p.Machines, p.Capacity), fmt.Sprint(p.Busy),
				fmt.Sprintf("%d/%d", p.Ready, p.Warm), fmt.Sprint(p.Queued), age(p.SeenAt, time.Now()), plain(p.Problem))
		}
		t.print(out, "")
		return nil
	})
}

type machinesCmd struct {
	Pool  string `placeholder:"NAME" help:"Only machines of this pool."`
	Limit int32  `short:"n" default:"50" placeholder:"N" help:"How many, at most 500 (${default})."`
	Page  string `placeholder:"ID" help:"Go on after this machine: what the list before ended with."`

	output
	connection
}

// Run is kong's.
func (c *machinesCmd) Run(e *env) error {
	if c.Limit < 1 {
		return unable(fmt.Sprintf("--limit is %d", c.Limit), nil, "give how many machines to list")
	}
	return c.with(e.ctx, "cannot list machines", func(cl *client.Client) error {
		resp, err := cl.ListMachines(e.ctx, &pb.ListMachinesRequest{Pool: c.Pool, PageSize: c.Limit, PageToken: c.Page})
		if err != nil {
			return err
		}
		machines := make([]solstice.Machine, 0, len(resp.GetMachines()))
		var ids []string
		for _, m := range resp.GetMachines() {
			machines = append(machines, solstice.Machine{
				ID: m.GetId(), Pool: m.GetPool(), Host: m.GetHost(), State: m.GetState(), AttemptID: m.GetAttemptId(), OS: m.GetOs(), Arch: m.GetArch(),
				AgentVersion: m.GetAgentVersion(), CreatedAt: timeOf(m.GetCreatedAt()), ContactAt: timeOf(m.GetContactAt()), Age: m.GetAge().AsDuration(),
			})
			ids = append(ids, m.GetId(), m.GetAttemptId())
		}
		if c.JSON {
			return document(struct {
				Machines []solstice.Machine `json:"machines"`
				Next     string             `json:"next_page,omitempty"`
			}{machines, resp.GetNextPageToken()})
		}
		id, out, t := short(ids...), c.screen(), table{}
		out.header(&t, "MACHINE", "POOL", "HOST", "STATE", "ATTEMPT", "SYSTEM", "AGENT", "CONTACT", "AGE")
		for _, m := range machines {
			t.row(id[m.ID], plain(m.Pool), plain(m.Host), words(m.State), id[m.AttemptID], plain(m.OS)+prefixed("/", plain(m.Arch)),
				plain(m.AgentVersion), age(m.ContactAt, time.Now()), span(m.Age))
		}
		t.print(out, "")
		if resp.GetNextPageToken() != "" {
			note("there may be more: --page %s", resp.GetNextPageToken())
		}
		return nil
	})
}

type tokenCmd struct {
	Create tokenCreateCmd `cmd:"" help:"Make a token; it is printed this once."`
	List   tokenListCmd   `cmd:"" help:"List the tokens that were not revoked."`
	Revoke tokenRevokeCmd `cmd:"" help:"End a token."`
}

// token is one in JSON.
type token struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Role      string    `json:"role"`
	CreatedAt time.Time `json:"created_at"`
	ExpiresAt time.Time `json:"expires_at,omitzero"`
	UsedAt    time.Time `json:"used_at,omitzero"`
	Secret    string    `json:"secret,omitempty"`
}

func tokenOf(t *pb.TokenInfo) token {
	return token{
		ID: t.GetId(), Name: t.GetName(), Role: word(t.GetRole(), "ROLE_"),
		CreatedAt: timeOf(t.GetCreatedAt()), ExpiresAt: timeOf(t.GetExpiresAt()), UsedAt: timeOf(t.GetUsedAt()),
	}
}

type tokenCreateCmd struct {
	Name string        `arg:"" help:"For people: whose it is. 1 to 32 letters, digits and ._@-"`
	Role string        `required:"" enum:"read,write,admin" placeholder:"ROLE" help:"What it is for: ${enum}; each includes those before it."`
	TTL  time.Duration `name:"ttl" placeholder:"TIME" help:"How long it is good for, such as 720h. Default: until it is revoked."`

	output
	connection
}

// Run is kong's.
func (c *tokenCreateCmd) Run(e *env) error {
	req := &pb.CreateTokenRequest{Name: c.Name, Role: pb.Role(pb.Role_value["ROLE_"+strings.ToUpper(c.Role)])}
	if c.TTL < 0 {
		return unable("--ttl is negative", nil, "give how long the token is good for")
	}
	if c.TTL > 0 {
		req.Ttl = durationpb.New(c.TTL)
	}
	return c.with(e.ctx, "cannot make the token", func(cl *client.Client) error {
		resp, err := cl.CreateToken(e.ctx, req)
		if err != nil {
			return err
		}
		t := tokenOf(resp.GetInfo())
		t.Secret = resp.GetToken()
		if c.JSON {
			return document(t)
		}
		note("token %s, role %s, %s; it is not shown again:", t.Name, t.Role, expiry(t))
		c.screen().printf("%s", t.Secret)
		return nil
	})
}

func expiry(t token) string {
	if t.ExpiresAt.IsZero() {
		return "does not expire"
	}
	return "expires " + t.ExpiresAt.Format(time.RFC3339)
}

type tokenListCmd struct {
	output
	connection
}

// Run is kong's.
func (c *tokenListCmd) Run(e *env) error {
	return c.with(e.ctx, "cannot list tokens", func(cl *client.Client) error {
		resp, err := cl.ListTokens(e.ctx, &pb.ListTokensRequest{})
		if err != nil {
			return err
		}
		tokens := make([]token, 0, len(resp.GetTokens()))
		for _, t := range resp.GetTokens() {
			tokens = append(tokens, tokenOf(t))
		}
		if c.JSON {
			return document(struct {
				Tokens []token `json:"tokens"`
			}{tokens})
		}
		out, t := c.screen(), table{}
		out.header(&t, "NAME", "ROLE", "AGE", "USED", "EXPIRES", "ID")
		for _, k := range tokens {
			used := age(k.UsedAt, time.Now())
			t.row(plain(k.Name), k.Role, age(k.CreatedAt, time.Now()), used, strings.TrimPrefix(expiry(k), "expires "), k.ID)
		}
		t.print(out, "")
		return nil
	})
}

type tokenRevokeCmd struct {
	Name string `arg:"" help:"Name or ID of the token."`

	output
	connection
}

// Run is kong's.
func (c *tokenRevokeCmd) Run(e *env) error {
	return c.with(e.ctx, "cannot revoke the token", func(cl *client.Client) error {
		if _, err := cl.RevokeToken(e.ctx, &pb.RevokeTokenRequest{Id: c.Name}); err != nil {
			return err
		}
		if c.JSON {
			return document(struct {
				Revoked string `json:"revoked"`
			}{c.Name})
		}
		c.screen().printf("token %s is revoked", plain(c.Name))
		return nil
	})
}
