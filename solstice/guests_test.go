package solstice_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/libvirtvm"
	"github.com/solstice-ci/solstice-go/vmprovider/remotevm"
)

// guests are what a pool of virtual machines is made of, as data, for processes of
// their own.
type guests struct {
	URI, Storage string
	StoragePath  string
	Image        string
	Contact      string // where guests reach the engine
	RunnerURL    string
	SHA256       string // of the agent for linux/amd64
	// DiesIn ends the process with SIGKILL in the middle of its first Create, or
	// of the first Destroy of a machine that it made.
	DiesIn string
}

func (g *guests) open(ctx context.Context) (vmprovider.Provider, error) {
	p, err := libvirtvm.New(ctx, libvirtvm.Config{
		URI: g.URI, Accelerator: libvirtvm.TCG, StoragePool: g.Storage,
		Network: libvirtvm.Network{Type: libvirtvm.NetworkUser}, MemoryBytes: 256 << 20,
	})
	if err != nil || g.DiesIn == "" {
		return p, err
	}
	return &dying{Provider: p, g: g}, nil
}

// serve has a pool's machines be such guests.
func (g *guests) serve(pool *solstice.Pool) {
	pool.Image = vmprovider.Image{Path: g.Image, Format: "qcow2"}
	pool.Contacts, pool.RunnerURL, pool.AgentSHA256 = []string{g.Contact}, g.RunnerURL, map[string]string{"linux/amd64": g.SHA256}
}

// dying is a provider whose process does not come to the end of a call.
type dying struct {
	vmprovider.Provider
	g    *guests
	made sync.Map
}

func (d *dying) As(target any) bool {
	w, ok := d.Provider.(interface{ As(target any) bool })
	return ok && w.As(target)
}

func die() {
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

// dieWhen kills the process as soon as a machine's volume is there, or not.
func (d *dying) dieWhen(id, kind string, there bool) {
	for {
		files, err := filepath.Glob(filepath.Join(d.g.StoragePath, id+"@*@"+kind))
		if err != nil || (len(files) > 0) == there {
			die()
		}
		time.Sleep(time.Millisecond)
	}
}

func (d *dying) Create(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
	d.made.Store(s.ID, nil)
	if d.g.DiesIn != "create" {
		return d.Provider.Create(ctx, s)
	}
	go d.dieWhen(s.ID, "seed", true)
	_, _ = d.Provider.Create(ctx, s)
	die()
	return vmprovider.Instance{}, nil
}

func (d *dying) Destroy(ctx context.Context, id string, o vmprovider.DestroyOptions) error {
	if _, mine := d.made.Load(id); d.g.DiesIn != "destroy" || !mine {
		return d.Provider.Destroy(ctx, id, o)
	}
	go d.dieWhen(id, "console", false)
	_ = d.Provider.Destroy(ctx, id, o)
	die()
	return nil
}

// pluginArg makes the test binary a provider plugin: guests as JSON, a file for
// its pid, --listen, where.
const pluginArg = "__solstice-test-plugin"

func pluginMain(args []string) error {
	if len(args) != 4 {
		return fmt.Errorf("arguments %q", args)
	}
	var g guests
	if err := json.Unmarshal([]byte(args[0]), &g); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // ends with who started it
		stop()
	}()
	p, err := g.open(ctx)
	if err != nil {
		return err
	}
	if err := os.WriteFile(args[1], fmt.Append(nil, os.Getpid()), 0o600); err != nil {
		return err
	}
	return errors.Join(remotevm.Serve(ctx, args[3], remotevm.NewServer(p, remotevm.ServerOptions{Name: "guests"}), nil), p.Close())
}
