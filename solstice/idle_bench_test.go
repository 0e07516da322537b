package solstice_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/processvm"
)

// handover makes machines whose agents another process runs: what an agent is
// told becomes a file in a directory.
type handover struct {
	vmprovider.Provider
	dir string
}

func (h handover) Create(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
	inst, err := h.Provider.Create(ctx, s)
	if err != nil {
		return inst, err
	}
	b, err := json.Marshal(processvm.BootstrapFile{
		Bootstrap: s.Bootstrap, StateDir: filepath.Join(h.dir, s.ID+".state"), WorkDir: filepath.Join(h.dir, s.ID+".work"),
	})
	if err != nil {
		return inst, err
	}
	tmp := filepath.Join(h.dir, s.ID+".tmp")
	return inst, errors.Join(os.WriteFile(tmp, b, 0o600), os.Rename(tmp, filepath.Join(h.dir, s.ID+".json")))
}

// memory reads a line of /proc/PID/status, proc(5), in bytes.
func memory(b *testing.B, pid int, field string) int64 {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Skipf("no memory figures on this system: %v", err)
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, field+":"); ok {
			kib, err := strconv.ParseInt(strings.Fields(v)[0], 10, 64)
			if err != nil {
				b.Fatal(err)
			}
			return kib << 10
		}
	}
	b.Fatalf("no %s in %s", field, data)
	return 0
}

// BenchmarkIdleAgents has a thousand warm machines at an engine of its own
// process, their agents in this one, over TLS as ever, and reports the memory of
// the engine's process: with its machines made and no agent yet, with all agents
// attached, and after each of them has sent two heartbeats more.
func BenchmarkIdleAgents(b *testing.B) {
	agents := brief(1000, 100)
	for range b.N {
		p := newPlant(b, "sqlite:"+filepath.Join(b.TempDir(), "solstice.db"))
		p.Timing, p.Capacity, p.Warm, p.Handover = solstice.Timing{}, agents, agents, b.TempDir()
		engine := p.spawn(b, "127.0.0.1:0")
		var files []string
		eventuallyWithin(b, 5*time.Minute, "all machines are made", func() bool {
			var err error
			if files, err = filepath.Glob(filepath.Join(p.Handover, "*.json")); err != nil {
				b.Fatal(err)
			}
			return len(files) == agents
		})
		pid := engine.Process.Pid
		before := memory(b, pid, "RssAnon")
		ctx, cancel := context.WithCancel(b.Context())
		var running sync.WaitGroup
		for _, f := range files {
			cfg, err := agent.LoadBootstrap(f)
			if err != nil {
				b.Fatal(err)
			}
			running.Go(func() {
				if err := agent.Run(ctx, cfg); !errors.Is(err, context.Canceled) {
					b.Errorf("an idle agent ended: %v", err)
				}
			})
		}
		db := p.openDB(b)
		ready := func(since int64) int64 {
			n, err := db.NewSelect().Table("machines").Where("state = 'ready'").Where("contact_at > ?", since).Count(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			return n
		}
		eventuallyWithin(b, 5*time.Minute, "all agents are attached", func() bool { return ready(0) == int64(agents) })
		attached := memory(b, pid, "RssAnon")
		var last int64
		for range 2 {
			if err := db.NewSelect().Table("machines").ColumnExpr("max(contact_at)").Scan(b.Context(), &last); err != nil {
				b.Fatal(err)
			}
			eventuallyWithin(b, 5*time.Minute, "all agents were heard of again", func() bool { return ready(last) == int64(agents) })
		}
		settled := memory(b, pid, "RssAnon")
		b.ReportMetric(float64(memory(b, pid, "VmRSS"))/1e6, "engine-MB")
		b.ReportMetric(float64(memory(b, pid, "VmHWM"))/1e6, "peak-MB")
		b.ReportMetric(float64(before)/1e6, "anon-before-MB")
		b.ReportMetric(float64(attached-before)/float64(agents), "B/agent-attached")
		b.ReportMetric(float64(settled-before)/float64(agents), "B/agent")
		cancel()
		running.Wait()
		_ = engine.Process.Kill()
		_, _ = engine.Process.Wait()
	}
}
