// Package agent is the agent that runs a job inside a machine.
//
// [Run] dials the orchestrators it was told of, enrols with the machine's
// single-use token, receives one job over one stream (solstice.agent.v1), runs
// its steps and reports everything they say and do as one acknowledged journal,
// which survives any number of lost connections. It never listens, but for a
// loopback proxy while the source is checked out, and returns when the end of
// the job is acknowledged.
//
// A program becomes an agent by calling [Hook] first thing in main; [Command]
// is what starts it again as one. examples/agent is nothing but an agent, the
// CLI and examples/embed run themselves as the agents of a process pool. For jobs
// that are trusted agents can be parts of a larger program ([RunInside]), also of
// the one that has the engine ([Local]): Run keeps no global state, and a panic
// ends its agent alone.
//
// # Promises
//
//   - The journal is complete and in order: what the server did not acknowledge
//     is kept on disk and sent again. The files are not synced to disk, because
//     the job dies with its agent, and the machine with both.
//   - Memory stays flat whatever the job prints. Beyond the job's log quota
//     output is dropped while the job runs on; a line in the log and an event
//     with the exact counts say so.
//   - Without contact for the agent deadline (monotonic clock) the job is
//     killed and the agent ends, so that the job can be started elsewhere.
//   - When the job is over nothing that it started is left, as far as the
//     system lets an agent see that: on Linux processes are found by descent,
//     by the marker variable SOLSTICE_MACHINE_ID in their environment, and, in
//     a process that is an agent only, as a subreaper; elsewhere by process
//     group and by what internal/proctree can do there.
//   - A step ends when its main process ends. Background children may live on
//     until the job ends; output they hold back is waited for one second, and
//     what they print later is discarded.
//
// # Steps
//
// Scripts run in a session of their own, with standard input empty and an
// environment built from nothing: Config.Env, then CI, the workflow's and the
// job's variables, those from SOLSTICE_ENV, the step's, and last the well-known
// ones: SOLSTICE, SOLSTICE_RUN_ID, SOLSTICE_JOB_ID, SOLSTICE_REPO_URL,
// SOLSTICE_COMMIT_SHA, SOLSTICE_REF, SOLSTICE_WORKDIR, SOLSTICE_MACHINE_ID, and
// the files SOLSTICE_OUTPUT, SOLSTICE_ENV and SOLSTICE_PATH (see
// [ParseVariables]). TRACEPARENT and TRACESTATE carry the trace where there is
// one.
package agent
