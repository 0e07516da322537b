package orchestrator

import (
	"context"
	"fmt"

	"google.golang.org/grpc"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/solstice"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

// Pages of lists.
const (
	defaultPage = 50
	maxPage     = 500
)

// maxLogMessage bounds the bytes of log in one message.
const maxLogMessage = 256 << 10

// service is solstice.orchestrator.v1.
type service struct {
	pb.UnimplementedOrchestratorServiceServer
	s *Server
	e *solstice.Engine
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", solstice.ErrInvalid, fmt.Sprintf(format, args...))
}

// Submit implements the service.
func (v *service) Submit(ctx context.Context, r *pb.SubmitRequest) (*pb.SubmitResponse, error) {
	switch {
	case len(r.GetIdempotencyKey()) > 255:
		return nil, invalid("the idempotency key has more than 255 bytes")
	case r.GetPriority() < -1000 || r.GetPriority() > 1000:
		return nil, invalid("the priority is not between -1000 and 1000")
	case r.GetRepo().GetName() == "":
		return nil, invalid("no repository is named")
	}
	req := solstice.RunRequest{
		Forge: r.GetForge(), Repo: forge.Repo{
			Owner: r.GetRepo().GetOwner(), Name: r.GetRepo().GetName(), URL: r.GetRepo().GetUrl(), DefaultBranch: r.GetRepo().GetDefaultBranch(),
		},
		Commit: r.GetCommit(), Ref: r.GetRef(), Workflow: r.GetWorkflow(), Jobs: r.GetJobs(), Inputs: r.GetInputs(),
		IdempotencyKey: r.GetIdempotencyKey(), Priority: int(r.GetPriority()),
	}
	if r.GetEvent() != nil {
		var err error
		if req.Event, err = eventOf(r.GetEvent(), req); err != nil {
			return nil, err
		}
	}
	runs, err := v.e.Submit(ctx, req)
	if err == nil && len(runs) == 0 && r.GetEvent() == nil && req.Workflow == "" && len(req.Inputs) == 0 {
		req.Event = forge.Event{Kind: forge.KindPush}
		runs, err = v.e.Submit(ctx, req)
	}
	if err != nil {
		return nil, err
	}
	resp := &pb.SubmitResponse{}
	for _, run := range runs {
		resp.Runs = append(resp.Runs, runPB(run))
	}
	return resp, nil
}

// eventOf is what was pushed. Whoever may start runs may say that somebody pushed;
// pull requests, whose trust is decided on what the event says, come from forges only.
func eventOf(e *pb.Event, r solstice.RunRequest) (forge.Event, error) {
	out := forge.Event{
		Kind: forge.Kind(e.GetKind()), Repo: r.Repo, Ref: r.Ref, Commit: r.Commit, Before: e.GetBefore(),
		Sender: forge.User{Login: e.GetSender()}, Title: e.GetTitle(), Message: e.GetMessage(),
	}
	switch {
	case out.Kind != forge.KindPush && out.Kind != forge.KindTag:
		return out, invalid("the kind of the event is %.20q, neither push nor tag", e.GetKind())
	case len(r.Inputs) > 0:
		return out, invalid("inputs are of a manual start, not of a %s", out.Kind)
	case len(out.Title) > 1<<10, len(out.Message) > 64<<10, len(out.Sender.Login) > 1<<10:
		return out, invalid("title, message or sender of the event are too long")
	case e.GetTime() != nil && e.GetTime().CheckValid() != nil:
		return out, invalid("the time of the event is none")
	case e.GetTime() != nil:
		out.Time = e.GetTime().AsTime()
	}
	return out, out.Validate()
}

// GetRun implements the service.
func (v *service) GetRun(ctx context.Context, r *pb.GetRunRequest) (*pb.GetRunResponse, error) {
	id, err := v.e.FindRun(ctx, r.GetRunId())
	if err != nil {
		return nil, err
	}
	run, err := v.e.GetRun(ctx, id)
	if err != nil {
		return nil, err
	}
	return &pb.GetRunResponse{Run: runPB(run)}, nil
}

// page gives the size of a page.
func page(n int32) (int, error) {
	if n < 0 {
		return 0, invalid("the page size is negative")
	}
	if n == 0 {
		n = defaultPage
	}
	return min(int(n), maxPage), nil
}

// ListRuns implements the service. A page's token is the last run's ID.
func (v *service) ListRuns(ctx context.Context, r *pb.ListRunsRequest) (*pb.ListRunsResponse, error) {
	n, err := page(r.GetPageSize())
	if err != nil {
		return nil, err
	}
	f := solstice.RunFilter{
		Forge: r.GetForge(), Commit: r.GetCommit(), Ref: r.GetRef(), Limit: n, Before: r.GetPageToken(),
		Repo: forge.Repo{Owner: r.GetRepo().GetOwner(), Name: r.GetRepo().GetName()}.FullName(),
	}
	for _, s := range r.GetStates() {
		state, ok := runStates.back(s)
		if !ok {
			return nil, invalid("%s is no state of a run", s)
		}
		f.States = append(f.States, state)
	}
	runs, err := v.e.Runs(ctx, f)
	if err != nil {
		return nil, err
	}
	resp := &pb.ListRunsResponse{}
	for _, run := range runs {
		resp.Runs = append(resp.Runs, runPB(run))
	}
	if len(runs) == n {
		resp.NextPageToken = runs[n-1].ID
	}
	return resp, nil
}

// WatchRun implements the service.
func (v *service) WatchRun(r *pb.WatchRunRequest, out grpc.ServerStreamingServer[pb.WatchRunResponse]) error {
	for run, err := range v.e.Watch(out.Context(), r.GetRunId()) {
		if err != nil {
			return err
		}
		if err := out.Send(&pb.WatchRunResponse{Run: runPB(run)}); err != nil {
			return err
		}
	}
	return nil
}

// GetJob implements the service.
func (v *service) GetJob(ctx context.Context, r *pb.GetJobRequest) (*pb.GetJobResponse, error) {
	id, err := v.findJob(ctx, r)
	if err != nil {
		return nil, err
	}
	job, err := v.e.Job(ctx, id)
	if err != nil {
		return nil, err
	}
	resp := &pb.GetJobResponse{Job: jobPB(job)}
	attempts, err := v.e.Attempts(ctx, job.ID)
	if err != nil {
		return nil, err
	}
	for _, a := range attempts {
		steps, err := v.e.Steps(ctx, a.ID)
		if err != nil {
			return nil, err
		}
		resp.Attempts = append(resp.Attempts, attemptPB(a, steps))
	}
	waiting, err := v.e.Waiting(ctx, job.ID)
	if err != nil {
		return nil, err
	}
	resp.Waiting = waitingPB(waiting)
	return resp, nil
}

func (v *service) findJob(ctx context.Context, r *pb.GetJobRequest) (string, error) {
	if r.GetAttemptId() == "" {
		return v.e.FindJob(ctx, r.GetJobId())
	}
	id, err := v.e.FindAttempt(ctx, r.GetAttemptId())
	if err != nil {
		return "", err
	}
	a, err := v.e.Attempt(ctx, id)
	return a.JobID, err
}

// TailLog implements the service.
func (v *service) TailLog(r *pb.TailLogRequest, out grpc.ServerStreamingServer[pb.TailLogResponse]) error {
	switch {
	case r.GetFrom() < 0:
		return invalid("the offset is negative")
	case r.GetAttempt() < 0:
		return invalid("the number of the attempt is negative")
	}
	first := max(1, int(r.GetAttempt())) // of a job
	ctx := out.Context()
	t := &tail{out: out}
	switch {
	case r.GetAttemptId() != "":
		a, err := v.e.Attempt(ctx, r.GetAttemptId())
		if err != nil {
			return err
		}
		read := v.e.Log
		if r.GetLocal() {
			read = v.e.LocalLog
		}
		return t.attempt(ctx, read, a, r.GetFrom(), r.GetFollow())
	case r.GetJobId() == "":
		return invalid("neither an attempt nor a job is named")
	case r.GetFollow():
		for c, err := range v.e.FollowJobFrom(ctx, r.GetJobId(), first, r.GetFrom()) {
			if err != nil {
				return err
			}
			if c.Begin {
				err = out.Send(&pb.TailLogResponse{Attempt: attemptPB(c.Attempt, nil), Durable: true})
			} else {
				err = t.chunk(c.Chunk, 0, -1)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	attempts, err := v.e.LogAttempts(ctx, r.GetJobId())
	if err != nil {
		return err
	}
	for _, a := range attempts {
		if a.Number < first {
			continue
		}
		if err := out.Send(&pb.TailLogResponse{Attempt: attemptPB(a, nil), Durable: true}); err != nil {
			return err
		}
		from := int64(0)
		if a.Number == first {
			from = r.GetFrom()
		}
		if err := t.attempt(ctx, v.e.Log, a, from, false); err != nil {
			return err
		}
	}
	return nil
}

// CancelRun implements the service.
func (v *service) CancelRun(ctx context.Context, r *pb.CancelRunRequest) (*pb.CancelRunResponse, error) {
	if err := v.e.Cancel(ctx, r.GetRunId(), clip(r.GetReason())); err != nil {
		return nil, err
	}
	return &pb.CancelRunResponse{}, nil
}

// RerunRun implements the service.
func (v *service) RerunRun(ctx context.Context, r *pb.RerunRunRequest) (*pb.RerunRunResponse, error) {
	if len(r.GetIdempotencyKey()) > 255 {
		return nil, invalid("the idempotency key has more than 255 bytes")
	}
	run, err := v.e.Rerun(ctx, r.GetRunId(), solstice.RerunOptions{Failed: r.GetFailed(), IdempotencyKey: r.GetIdempotencyKey()})
	if err != nil {
		return nil, err
	}
	return &pb.RerunRunResponse{Run: runPB(run)}, nil
}

// ApproveRun implements the service.
func (v *service) ApproveRun(ctx context.Context, r *pb.ApproveRunRequest) (*pb.ApproveRunResponse, error) {
	run, err := v.e.Approve(ctx, r.GetRunId(), r.GetCommit())
	if err != nil {
		return nil, err
	}
	return &pb.ApproveRunResponse{Run: runPB(run)}, nil
}

// ListPools implements the service.
func (v *service) ListPools(ctx context.Context, _ *pb.ListPoolsRequest) (*pb.ListPoolsResponse, error) {
	pools, err := v.e.Pools(ctx)
	if err != nil {
		return nil, err
	}
	resp := &pb.ListPoolsResponse{}
	for _, p := range pools {
		resp.Pools = append(resp.Pools, poolPB(p))
	}
	return resp, nil
}

// ListMachines implements the service. A page's token is the last machine's ID.
func (v *service) ListMachines(ctx context.Context, r *pb.ListMachinesRequest) (*pb.ListMachinesResponse, error) {
	n, err := page(r.GetPageSize())
	if err != nil {
		return nil, err
	}
	machines, err := v.e.Machines(ctx, solstice.MachineFilter{Pool: r.GetPool(), Limit: n, After: r.GetPageToken()})
	if err != nil {
		return nil, err
	}
	resp := &pb.ListMachinesResponse{}
	for _, m := range machines {
		resp.Machines = append(resp.Machines, machinePB(m))
	}
	if len(machines) == n {
		resp.NextPageToken = machines[n-1].ID
	}
	return resp, nil
}

// CreateToken implements the service.
func (v *service) CreateToken(ctx context.Context, r *pb.CreateTokenRequest) (*pb.CreateTokenResponse, error) {
	if r.GetTtl() != nil && (r.GetTtl().CheckValid() != nil || r.GetTtl().AsDuration() <= 0) {
		return nil, invalid("the time to live is not positive")
	}
	t, secret, err := v.s.cfg.Tokens.Create(ctx, r.GetName(), Role(r.GetRole()), r.GetTtl().AsDuration())
	if err != nil {
		return nil, err
	}
	v.s.log.InfoContext(ctx, "token created", "token", t.ID, "name", t.Name, "role", t.Role.String())
	return &pb.CreateTokenResponse{Info: tokenPB(t), Token: secret}, nil
}

// ListTokens implements the service.
func (v *service) ListTokens(ctx context.Context, _ *pb.ListTokensRequest) (*pb.ListTokensResponse, error) {
	tokens, err := v.s.cfg.Tokens.List(ctx)
	if err != nil {
		return nil, err
	}
	resp := &pb.ListTokensResponse{}
	for _, t := range tokens {
		resp.Tokens = append(resp.Tokens, tokenPB(t))
	}
	return resp, nil
}

// RevokeToken implements the service.
func (v *service) RevokeToken(ctx context.Context, r *pb.RevokeTokenRequest) (*pb.RevokeTokenResponse, error) {
	if err := v.s.cfg.Tokens.Revoke(ctx, r.GetId()); err != nil {
		return nil, err
	}
	v.s.log.InfoContext(ctx, "token revoked", "token", r.GetId())
	return &pb.RevokeTokenResponse{}, nil
}
