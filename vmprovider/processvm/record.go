//go:build unix

package processvm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/internal/proctree"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// What a machine's directory holds.
const (
	recordFile    = "machine.json"
	statusFile    = "status.json"
	bootstrapFile = "bootstrap.json"
	consoleFile   = "console"
	stateDir      = "state"
	workDir       = "work"
)

// What Root holds besides machines. A directory gets its machine's name once
// its record and its files are complete, and loses it when all that is left is
// the record, so a machine's directory always says whose it is.
const (
	stagingPrefix = ".new-"  // + creator's proctree.ID + "." + machine ID
	gonePrefix    = ".gone-" // + machine ID
)

// BootstrapFile is what the agent reads: JSON, the fields of
// vmprovider.Bootstrap and those below. The file has mode 0600; the agent may
// delete it once it has enrolled.
type BootstrapFile struct {
	vmprovider.Bootstrap
	// Env is the base environment of workflow steps; nothing else is passed on.
	Env map[string]string `json:"env"`
	// StateDir is the directory that the agent makes for what it keeps itself.
	StateDir string `json:"state_dir"`
	// WorkDir is the directory that the agent makes for the job's files.
	WorkDir string `json:"work_dir"`
	// Cgroup is the control group in which an agent inside another process
	// starts its steps; empty: none. An agent process is in it itself.
	Cgroup string `json:"cgroup,omitempty"`
}

// intent is what machine.json says, durably, before the machine is begun. It
// holds no secret.
type intent struct {
	ID          string            `json:"id"`
	Owner       string            `json:"owner"`
	Image       vmprovider.Image  `json:"image"`
	CPUs        int               `json:"cpus,omitempty"`
	MemoryBytes int64             `json:"memory_bytes,omitempty"`
	DiskBytes   int64             `json:"disk_bytes,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	CreatedAt   time.Time         `json:"created_at"`
	ExpiresAt   time.Time         `json:"expires_at"`
	Command     []string          `json:"command,omitempty"`
	// Inside says that the agent is part of the process that creates the machine.
	Inside bool `json:"inside,omitempty"`
	// Creator is the process that creates the machine.
	Creator proctree.ID `json:"creator"`
	// Cgroup is where the process, or what the agent inside starts, is to be; ""
	// where there is none to be had.
	Cgroup string `json:"cgroup,omitempty"`
}

// status is what the last line of status.json says; a line is added as things
// happen. If a crash of the host loses it, nothing runs any more anyway.
type status struct {
	// Process is the agent's, once it was started.
	Process *proctree.ID `json:"process,omitempty"`
	// Contained says that it was started inside Cgroup.
	Contained bool `json:"contained,omitempty"`
	// Exit says how the process ended, once that is known.
	Exit string `json:"exit,omitempty"`
	// Destroying is why the machine is of no use any more.
	Destroying string `json:"destroying,omitempty"`
}

type record struct {
	intent
	status
}

func (r record) state() (s vmprovider.State, reason string) {
	switch {
	case r.Destroying != "":
		return vmprovider.StateLeftover, r.Destroying
	case r.Exit != "":
		return vmprovider.StateStopped, r.Exit
	case r.Inside && r.Creator.Alive():
		return vmprovider.StateRunning, ""
	case r.Inside:
		return vmprovider.StateStopped, "the process that it ran inside has ended"
	case r.Process == nil && r.Creator.Alive():
		return vmprovider.StateCreating, ""
	case r.Process == nil:
		return vmprovider.StateLeftover, "its creator ended before the machine was complete"
	case r.Process.Alive():
		return vmprovider.StateRunning, ""
	default:
		return vmprovider.StateStopped, "ended unobserved"
	}
}

// load reads a machine's record. An error wraps fs.ErrNotExist where there is
// nothing of the machine; with any other the record has at least its ID.
func (p *Provider) load(id string) (record, error) {
	r := record{intent: intent{ID: id}}
	b, err := p.root.ReadFile(filepath.Join(id, recordFile))
	if errors.Is(err, fs.ErrNotExist) {
		if _, dirErr := p.root.Lstat(id); dirErr == nil {
			return r, errors.New("no record")
		}
		return r, err
	}
	if err != nil {
		return r, fmt.Errorf("unreadable record: %w", err)
	}
	if err := json.Unmarshal(b, &r.intent); err != nil || r.ID != id {
		return record{intent: intent{ID: id}}, errors.New("damaged record")
	}
	b, err = p.root.ReadFile(filepath.Join(id, statusFile))
	for line := range bytes.Lines(b) {
		var s status
		if json.Unmarshal(line, &s) == nil { // the last one may not be whole yet
			r.status = s
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r, fmt.Errorf("unreadable status: %w", err)
	}
	return r, nil
}

// writeIntent writes the record into a directory that nobody knows yet.
func (p *Provider) writeIntent(dir string, r record) error {
	b, err := json.Marshal(r.intent)
	if err != nil {
		return err
	}
	f, err := p.root.OpenFile(filepath.Join(dir, recordFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

// saveStatus adds the status of a machine to what was said before, which costs
// no new file. It fails where its directory is gone.
func (p *Provider) saveStatus(r record) error {
	b, err := json.Marshal(r.status)
	if err != nil {
		return err
	}
	f, err := p.root.OpenFile(filepath.Join(r.ID, statusFile), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	return errors.Join(err, f.Close())
}

// names is the content of Root.
func (p *Provider) names() ([]string, error) {
	d, err := p.root.Open(".")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

func (p *Provider) stagingName(id string) string {
	return stagingPrefix + p.self.String() + "." + id
}

// sweep removes what was never a machine, because its creator died before it
// was one, and what is none any more. No process belongs to either.
func (p *Provider) sweep() error {
	names, err := p.names()
	if err != nil {
		return fmt.Errorf("processvm: sweep: %w", err)
	}
	for _, name := range names {
		if s, ok := strings.CutPrefix(name, stagingPrefix); ok {
			i := strings.LastIndexByte(s, '.')
			creator, err := proctree.ParseID(s[:max(i, 0)])
			if err == nil && creator.Alive() {
				continue
			}
		} else if !strings.HasPrefix(name, gonePrefix) {
			continue
		}
		if err := removeTree(p.ctx, p.root, name); err != nil {
			p.log.Warn("cannot remove a remnant", "name", name, "error", err)
		}
	}
	return nil
}
