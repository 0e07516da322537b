//go:build linux

package main

import (
	"context"
	"os"
	"testing"

	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/remotevm"
	"github.com/solstice-ci/solstice-go/vmprovider/vmprovidertest"
)

// TestConformance runs the suite on the provider itself.
func TestConformance(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	vmprovidertest.Run(t, h.harness(func(t vmprovidertest.T) vmprovider.Provider {
		p, err := New(h.cfg)
		if err != nil {
			t.Fatalf("%v", err)
		}
		return p
	}))
	h.empty()
}

// TestConformanceAsPlugin runs the same on a plugin that the suite's side starts,
// so that to close a provider is to end its process.
func TestConformanceAsPlugin(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	vmprovidertest.Run(t, h.harness(func(t vmprovidertest.T) vmprovider.Provider {
		// The suite opens one to clean up, too, when the test's own context has ended.
		p, err := remotevm.Start(context.WithoutCancel(t.Context()), remotevm.Command{
			Argv: []string{h.exe, asPlugin, "--root", h.cfg.Root, "--accelerator", "tcg", "--memory-mb", "32", "--max", "4"},
		})
		if err != nil {
			t.Fatalf("%v", err)
		}
		return p
	}))
	h.empty()
}

// host is a root of its own, with images for its guests.
type host struct {
	t           *testing.T
	cfg         Config
	exe, images string
}

func newHost(t *testing.T) *host {
	t.Helper()
	root, err := os.MkdirTemp("", "qemuvm-") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(root) })
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return &host{t, Config{Root: root, Accelerator: "tcg", MemoryBytes: 32 << 20, Max: 4}, exe, t.TempDir()}
}

// harness tells the suite how to reach the provider, and how to make guests that
// behave as its checks need it.
func (h *host) harness(open func(vmprovidertest.T) vmprovider.Provider) vmprovidertest.Harness {
	boots := func(code []byte) func(vmprovidertest.T, *vmprovider.Spec) {
		return func(_ vmprovidertest.T, s *vmprovider.Spec) { h.complete(s, code) }
	}
	return vmprovidertest.Harness{
		Open:       open,
		Spec:       boots(halt),
		NeverBoots: boots(halt),
		ExitsEarly: boots(powerOff),
		Panics:     boots(panics),
		Prints: func(_ vmprovidertest.T, s *vmprovider.Spec, text string) {
			h.complete(s, says(text))
		},
		Leave: func(_ vmprovidertest.T, id, owner string) {
			s := vmprovider.Spec{ID: id, Owner: owner}
			h.complete(&s, halt)
			h.killed("create", s, "seed")
		},
		Capacity: h.cfg.Max,
		Parallel: 3,
	}
}

// complete gives a spec an image and something to boot for.
func (h *host) complete(s *vmprovider.Spec, code []byte) {
	h.t.Helper()
	s.Image = vmprovider.Image{Path: image(h.t, h.images, code), Format: "raw"}
	s.Bootstrap = bootstrap(h.t, h.images)
}

// empty asserts that no part of any machine is left: no directory, and so no process,
// since Destroy waits for those first.
func (h *host) empty() {
	h.t.Helper()
	entries, err := os.ReadDir(h.cfg.Root)
	for _, e := range entries {
		if e.IsDir() {
			h.t.Errorf("left: %s", e.Name())
		}
	}
	if err != nil {
		h.t.Error(err)
	}
}
