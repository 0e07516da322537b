// Package solsticego is the map of this module: it holds no code.
//
// Solstice runs CI jobs on throw-away virtual machines. It is a library that
// other programs embed, a set of thin programs that show how, and a contract for
// authors of drivers.
//
//	forge webhook → queue → orchestrator → machine per job → agent in it
//	                          ↑ the database is the truth      │ one acknowledged journal over gRPC
//	                          └───────────────────────────────┘ steps, log bytes, outputs
//
// Where to look:
//
//   - solstice: the engine. Config, New, Migrate, Submit, Cancel, Rerun, Log; how
//     runs, jobs and attempts move from state to state. Start here to embed.
//   - solstice/workflow: workflow files to validated plans, with diagnostics.
//   - solstice/agent: what runs in the machine. solstice/api: its protocol,
//     and the messages that go through queues (solstice/api/messages).
//   - solstice/logstream: logs that are appended at offsets, followed and sealed.
//   - solstice/orchestrator: the engine as a service for people and programs, with
//     tokens and roles; its client in the package below it.
//   - solstice/integration: webhooks in, for a program with an http.ServeMux.
//   - solstice/runpages, solstice/logtext: what the links of statuses lead to, and
//     text of jobs made safe to look at.
//   - solstice/daemon, solstice/telemetry: what a main is made of.
//   - queue, blobstore, vmprovider, forge: the seams. Each is an interface, with
//     helpers that every user needs, drivers in packages below it, and a
//     conformance suite (queuetest, …) that anybody's driver can run.
//     vmprovider/libvirtvm makes virtual machines with libvirt;
//     vmprovider/image has base images of virtual machines, a catalogue and a store;
//     vmprovider/seed tells a fresh virtual machine what it is for;
//     vmprovider/remotevm has a plugin make machines, such as examples/qemuvm, a
//     module of its own (docs/writing-a-vm-provider.md);
//     forge/remoteforge does so for forges, such as examples/bareforge
//     (docs/writing-a-forge.md).
//   - examples: the CLI (examples/solstice), the daemons (examples/orchestrator;
//     examples/forge-integration and examples/github-integration, which own forges),
//     the agent's main, and an embedding in a hundred lines (examples/embed). They import nothing internal.
//   - internal/store: the rows and transitions that the engine stands on;
//     internal/house: the rules of this module as tests.
//
// What is promised: a job is executed at least once, has exactly one recorded
// result, and its statuses converge. The rules behind it are in CONTRIBUTING.md.
package solsticego
