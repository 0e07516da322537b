package main

import (
	"context"
	"errors"
	"iter"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/solstice"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/orchestrator/client"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

// remote is an orchestrator's engine as far as follow needs one. The words of
// the engine, whose JSON is documented, are those of this program too.
type remote struct{ c *client.Client }

// Watch is Engine.Watch.
func (r remote) Watch(ctx context.Context, runID string) iter.Seq2[solstice.Run, error] {
	return func(yield func(solstice.Run, error) bool) {
		for run, err := range r.c.Watch(ctx, runID) {
			if !yield(runOf(run), err) {
				return
			}
		}
	}
}

// FollowJob is Engine.FollowJob.
func (r remote) FollowJob(ctx context.Context, jobID string) iter.Seq2[solstice.JobChunk, error] {
	return r.tail(ctx, &pb.TailLogRequest{Of: &pb.TailLogRequest_JobId{JobId: jobID}, Follow: true})
}

func (r remote) tail(ctx context.Context, req *pb.TailLogRequest) iter.Seq2[solstice.JobChunk, error] {
	return func(yield func(solstice.JobChunk, error) bool) {
		var a solstice.Attempt
		for m, err := range r.c.Tail(ctx, req) {
			c := solstice.JobChunk{}
			if m.GetAttempt() != nil {
				a, c.Begin = attemptOf(m.GetAttempt()), true
			} else {
				c.Chunk = logstream.Chunk{Offset: m.GetOffset(), Data: m.GetData(), Durable: m.GetDurable()}
				for _, k := range m.GetMarks() {
					c.Chunk.Marks = append(c.Chunk.Marks, logstream.Mark{Offset: k.GetOffset(), Time: k.GetTime().AsTime(), Step: int(k.GetStep()), FD: int(k.GetFd())})
				}
			}
			c.Attempt = a
			if !yield(c, err) {
				return
			}
		}
	}
}

// Steps is Engine.Steps.
func (r remote) Steps(ctx context.Context, attemptID string) ([]solstice.Step, error) {
	resp, err := r.c.GetJob(ctx, &pb.GetJobRequest{AttemptId: attemptID})
	if err != nil {
		return nil, err
	}
	for _, a := range resp.GetAttempts() {
		if a.GetId() == attemptID {
			return stepsOf(a), nil
		}
	}
	return nil, errors.New("the orchestrator does not know the attempt any more")
}

// Attempts is Engine.Attempts.
func (r remote) Attempts(ctx context.Context, jobID string) ([]solstice.Attempt, error) {
	resp, err := r.c.GetJob(ctx, &pb.GetJobRequest{JobId: jobID})
	if err != nil {
		return nil, err
	}
	var out []solstice.Attempt
	for _, a := range resp.GetAttempts() {
		out = append(out, attemptOf(a))
	}
	return out, nil
}

// run gives one by its ID or a prefix of it.
func (r remote) run(ctx context.Context, id string) (solstice.Run, error) {
	resp, err := r.c.GetRun(ctx, &pb.GetRunRequest{RunId: id})
	return runOf(resp.GetRun()), err
}

// word makes RUN_STATE_QUEUED the engine's "queued".
func word(enum interface{ String() string }, prefix string) string {
	w := strings.ToLower(strings.TrimPrefix(enum.String(), prefix))
	if w == "unspecified" {
		return ""
	}
	return w
}

func timeOf(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func runOf(r *pb.Run) solstice.Run {
	out := solstice.Run{
		ID: r.GetId(), State: solstice.RunState(word(r.GetState(), "RUN_STATE_")), Forge: r.GetForge(),
		Repo:   forge.Repo{Owner: r.GetRepo().GetOwner(), Name: r.GetRepo().GetName(), URL: r.GetRepo().GetUrl()},
		Commit: r.GetCommit(), Ref: r.GetRef(), Workflow: r.GetWorkflow(), WorkflowPath: r.GetWorkflowPath(),
		Event: forge.Kind(r.GetEvent()), RerunOf: r.GetRerunOf(), Reason: r.GetReason(),
		CreatedAt: timeOf(r.GetCreatedAt()), StartedAt: timeOf(r.GetStartedAt()), FinishedAt: timeOf(r.GetFinishedAt()),
		LogsRemoved: r.GetLogsRemoved(), Head: r.GetHead(), Note: r.GetNote(),
	}
	for _, d := range r.GetDiagnostics() {
		out.Diagnostics = append(out.Diagnostics, workflow.Diagnostic{
			Path: d.GetFile(), Line: int(d.GetLine()), Column: int(d.GetColumn()), EndColumn: int(d.GetColumn()) + 1,
			Severity: workflow.Severity(d.GetSeverity()), Message: d.GetMessage(), Hint: d.GetAdvice(),
		})
	}
	for _, j := range r.GetJobs() {
		out.Jobs = append(out.Jobs, jobOf(j))
	}
	return out
}

func jobOf(j *pb.Job) solstice.Job {
	return solstice.Job{
		ID: j.GetId(), RunID: j.GetRunId(), Key: j.GetKey(), Name: j.GetName(), Label: j.GetLabel(),
		State: solstice.JobState(word(j.GetState(), "JOB_STATE_")), Needs: j.GetNeeds(),
		Class: solstice.Class(word(j.GetClass(), "FAILURE_CLASS_")), Reason: j.GetReason(), Outputs: j.GetOutputs(),
		Attempts: int(j.GetAttempts()), AttemptID: j.GetAttemptId(), CopiedFrom: j.GetCopiedFrom(),
		QueuedAt: timeOf(j.GetQueuedAt()), StartedAt: timeOf(j.GetStartedAt()), FinishedAt: timeOf(j.GetFinishedAt()),
	}
}

func attemptOf(a *pb.Attempt) solstice.Attempt {
	return solstice.Attempt{
		ID: a.GetId(), JobID: a.GetJobId(), RunID: a.GetRunId(), Number: int(a.GetNumber()),
		State: solstice.AttemptState(word(a.GetState(), "ATTEMPT_STATE_")), MachineID: a.GetMachineId(),
		Class: solstice.Class(word(a.GetClass(), "FAILURE_CLASS_")), Reason: a.GetReason(), Console: a.GetConsole(),
		LogSize: a.GetLogSize(), LogLost: a.GetLogLost(),
		CreatedAt: timeOf(a.GetCreatedAt()), StartedAt: timeOf(a.GetStartedAt()), FinishedAt: timeOf(a.GetFinishedAt()),
	}
}

func stepsOf(a *pb.Attempt) []solstice.Step {
	var out []solstice.Step
	for _, s := range a.GetSteps() {
		out = append(out, solstice.Step{
			Index: int(s.GetIndex()), Name: s.GetName(), Result: s.GetResult(), ExitCode: int(s.GetExitCode()), Signal: s.GetSignal(),
			Reason: s.GetReason(), Continued: s.GetContinued(), StartedAt: timeOf(s.GetStartedAt()), FinishedAt: timeOf(s.GetFinishedAt()),
		})
	}
	return out
}

func waitingOf(w *pb.Waiting) *solstice.Waiting {
	if w == nil {
		return nil
	}
	return &solstice.Waiting{Reason: solstice.WaitReason(word(w.GetReason(), "WAIT_REASON_")), Message: w.GetMessage(), Needs: w.GetNeeds(), Ahead: w.GetAhead()}
}
