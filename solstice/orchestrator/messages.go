package orchestrator

import (
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/solstice-ci/solstice-go/solstice"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

// names relates the engine's words to the protocol's numbers; what it does not
// know is unspecified.
type names[S ~string, E ~int32] map[S]E

func (n names[S, E]) back(e E) (S, bool) {
	for s, x := range n {
		if x == e {
			return s, true
		}
	}
	return "", false
}

var runStates = names[solstice.RunState, pb.RunState]{
	solstice.RunPlanning: pb.RunState_RUN_STATE_PLANNING, solstice.RunAwaitingApproval: pb.RunState_RUN_STATE_AWAITING_APPROVAL,
	solstice.RunQueued: pb.RunState_RUN_STATE_QUEUED, solstice.RunRunning: pb.RunState_RUN_STATE_RUNNING,
	solstice.RunSucceeded: pb.RunState_RUN_STATE_SUCCEEDED, solstice.RunFailed: pb.RunState_RUN_STATE_FAILED,
	solstice.RunCancelled: pb.RunState_RUN_STATE_CANCELLED, solstice.RunErrored: pb.RunState_RUN_STATE_ERRORED,
	solstice.RunSkipped: pb.RunState_RUN_STATE_SKIPPED,
}

var jobStates = names[solstice.JobState, pb.JobState]{
	solstice.JobWaiting: pb.JobState_JOB_STATE_WAITING, solstice.JobQueued: pb.JobState_JOB_STATE_QUEUED,
	solstice.JobAssigned: pb.JobState_JOB_STATE_ASSIGNED, solstice.JobRunning: pb.JobState_JOB_STATE_RUNNING,
	solstice.JobSucceeded: pb.JobState_JOB_STATE_SUCCEEDED, solstice.JobFailed: pb.JobState_JOB_STATE_FAILED,
	solstice.JobCancelled: pb.JobState_JOB_STATE_CANCELLED, solstice.JobTimedOut: pb.JobState_JOB_STATE_TIMED_OUT,
	solstice.JobErrored: pb.JobState_JOB_STATE_ERRORED, solstice.JobSkipped: pb.JobState_JOB_STATE_SKIPPED,
}

var attemptStates = names[solstice.AttemptState, pb.AttemptState]{
	solstice.AttemptAssigned: pb.AttemptState_ATTEMPT_STATE_ASSIGNED, solstice.AttemptRunning: pb.AttemptState_ATTEMPT_STATE_RUNNING,
	solstice.AttemptFinished: pb.AttemptState_ATTEMPT_STATE_FINISHED, solstice.AttemptLost: pb.AttemptState_ATTEMPT_STATE_LOST,
}

var classes = names[solstice.Class, pb.FailureClass]{
	solstice.ClassUser: pb.FailureClass_FAILURE_CLASS_USER, solstice.ClassTimeout: pb.FailureClass_FAILURE_CLASS_TIMEOUT,
	solstice.ClassCancelled: pb.FailureClass_FAILURE_CLASS_CANCELLED, solstice.ClassBoot: pb.FailureClass_FAILURE_CLASS_BOOT,
	solstice.ClassAgentLost: pb.FailureClass_FAILURE_CLASS_AGENT_LOST, solstice.ClassInfra: pb.FailureClass_FAILURE_CLASS_INFRA,
	solstice.ClassCapacity: pb.FailureClass_FAILURE_CLASS_CAPACITY, solstice.ClassNoAnswer: pb.FailureClass_FAILURE_CLASS_NO_ANSWER,
}

var waitReasons = names[solstice.WaitReason, pb.WaitReason]{
	solstice.WaitNeeds: pb.WaitReason_WAIT_REASON_NEEDS, solstice.WaitApproval: pb.WaitReason_WAIT_REASON_APPROVAL,
	solstice.WaitNoPool: pb.WaitReason_WAIT_REASON_NO_POOL, solstice.WaitPoolFull: pb.WaitReason_WAIT_REASON_POOL_FULL,
	solstice.WaitBehind: pb.WaitReason_WAIT_REASON_BEHIND, solstice.WaitMachine: pb.WaitReason_WAIT_REASON_MACHINE,
	solstice.WaitBoots: pb.WaitReason_WAIT_REASON_BOOTS,
	solstice.WaitBoot:  pb.WaitReason_WAIT_REASON_BOOT, solstice.WaitClaim: pb.WaitReason_WAIT_REASON_CLAIM,
}

// stamp is absent for a time that has not come.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// text is what the protocol takes as a string; guests print anything.
func text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

func runPB(r solstice.Run) *pb.Run {
	out := &pb.Run{
		Id: r.ID, State: runStates[r.State], Forge: r.Forge, Repo: &pb.Repo{Owner: r.Repo.Owner, Name: r.Repo.Name, Url: r.Repo.URL},
		Commit: r.Commit, Ref: r.Ref, Workflow: r.Workflow, WorkflowPath: r.WorkflowPath, Event: string(r.Event), RerunOf: r.RerunOf,
		Reason: text(r.Reason), CreatedAt: stamp(r.CreatedAt), StartedAt: stamp(r.StartedAt), FinishedAt: stamp(r.FinishedAt),
		LogsRemoved: r.LogsRemoved, Head: r.Head, Note: text(r.Note),
	}
	if r.RerunOf != "" {
		out.Event = "rerun"
	}
	for _, d := range r.Diagnostics {
		out.Diagnostics = append(out.Diagnostics, &pb.Diagnostic{
			File: text(d.Path), Line: int32(d.Line), Column: int32(d.Column), Severity: string(d.Severity), Message: text(d.Message), Advice: text(d.Hint),
		})
	}
	for _, j := range r.Jobs {
		out.Jobs = append(out.Jobs, jobPB(j))
	}
	return out
}

func jobPB(j solstice.Job) *pb.Job {
	return &pb.Job{
		Id: j.ID, RunId: j.RunID, Key: j.Key, Name: j.Name, Label: j.Label, State: jobStates[j.State], Needs: j.Needs,
		Class: classes[j.Class], Reason: text(j.Reason), Outputs: j.Outputs, Attempts: int32(j.Attempts), AttemptId: j.AttemptID,
		CopiedFrom: j.CopiedFrom, QueuedAt: stamp(j.QueuedAt), StartedAt: stamp(j.StartedAt), FinishedAt: stamp(j.FinishedAt),
	}
}

func attemptPB(a solstice.Attempt, steps []solstice.Step) *pb.Attempt {
	out := &pb.Attempt{
		Id: a.ID, JobId: a.JobID, RunId: a.RunID, Number: int32(a.Number), State: attemptStates[a.State], MachineId: a.MachineID,
		Class: classes[a.Class], Reason: text(a.Reason), Console: text(a.Console), LogSize: a.LogSize, LogLost: a.LogLost,
		CreatedAt: stamp(a.CreatedAt), StartedAt: stamp(a.StartedAt), FinishedAt: stamp(a.FinishedAt),
	}
	for _, s := range steps {
		out.Steps = append(out.Steps, &pb.Step{
			Index: int32(s.Index), Name: s.Name, Result: s.Result, ExitCode: int32(s.ExitCode), Signal: s.Signal, Reason: text(s.Reason),
			Continued: s.Continued, StartedAt: stamp(s.StartedAt), FinishedAt: stamp(s.FinishedAt),
		})
	}
	return out
}

func waitingPB(w solstice.Waiting) *pb.Waiting {
	if w.Reason == "" {
		return nil
	}
	return &pb.Waiting{Reason: waitReasons[w.Reason], Message: w.Message, Needs: w.Needs, Ahead: w.Ahead}
}

func poolPB(p solstice.PoolInfo) *pb.Pool {
	return &pb.Pool{
		Name: p.Name, Labels: p.Labels, Host: p.Host, Orchestrator: p.Orchestrator, Capacity: int32(p.Capacity), Machines: int32(p.Machines),
		Busy: int32(p.Busy), Warm: int32(p.Warm), Queued: p.Queued, SeenAt: stamp(p.SeenAt),
		Ready: int32(p.Ready), Booting: int32(p.Booting), Problem: text(p.Problem),
	}
}

func machinePB(m solstice.Machine) *pb.Machine {
	return &pb.Machine{
		Id: m.ID, Pool: m.Pool, Host: m.Host, State: m.State, AttemptId: m.AttemptID, Os: m.OS, Arch: m.Arch, AgentVersion: m.AgentVersion,
		CreatedAt: stamp(m.CreatedAt), ContactAt: stamp(m.ContactAt), Age: durationpb.New(m.Age),
	}
}

func tokenPB(t Token) *pb.TokenInfo {
	return &pb.TokenInfo{
		Id: t.ID, Name: t.Name, Role: pb.Role(t.Role), CreatedAt: stamp(t.CreatedAt), ExpiresAt: stamp(t.ExpiresAt), UsedAt: stamp(t.UsedAt),
	}
}
