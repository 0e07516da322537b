package memvm_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
)

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func provider(s memvm.Script) *memvm.Provider {
	return memvm.New(memvm.Config{Script: func(vmprovider.Spec) memvm.Script { return s }})
}

func destroy(t *testing.T, p *memvm.Provider, id string) {
	t.Helper()
	ok(t, p.Destroy(t.Context(), id, vmprovider.DestroyOptions{}))
}

// TestAgent runs a function instead of an agent, which gets its bootstrap.
func TestAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := provider(memvm.Script{
			Console: "power-on\n", Boot: 30 * time.Second,
			Agent: func(ctx context.Context, m memvm.Machine) error {
				fmt.Fprintln(m.Console, "token", m.Spec.Bootstrap.Token)
				if m.Spec.Bootstrap.Token == "wait" {
					<-ctx.Done()
				}
				return errors.New("refused")
			},
		})
		began := time.Now()
		_, err := p.Create(t.Context(), vmprovider.Spec{ID: "a", Bootstrap: vmprovider.Bootstrap{Token: "t"}})
		ok(t, err)
		inst, err := vmprovider.Wait(t.Context(), p, "a", func(i vmprovider.Instance) bool { return i.State == vmprovider.StateStopped })
		if err != nil || inst.Reason != "agent: refused" || time.Since(began) != 30*time.Second {
			t.Errorf("after %v: %+v, %v", time.Since(began), inst, err)
		}
		r, err := p.Console(t.Context(), "a", true)
		ok(t, err)
		if b, err := io.ReadAll(r); err != nil || string(b) != "power-on\ntoken t\n" {
			t.Errorf("console: %q, %v", b, err)
		}
		destroy(t, p, "a")
		// Destroy ends an agent that runs, and waits for it.
		_, err = p.Create(t.Context(), vmprovider.Spec{ID: "b", Bootstrap: vmprovider.Bootstrap{Token: "wait"}})
		ok(t, err)
		time.Sleep(time.Minute) // the bubble's
		destroy(t, p, "b")
		if p.Hypervisor().Len() != 0 {
			t.Error("machines left")
		}
	})
}

func TestHangAndCrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := provider(memvm.Script{Hang: true, Crash: time.Hour, Agent: func(context.Context, memvm.Machine) error {
			t.Error("a machine that hangs started its agent")
			return nil
		}})
		_, err := p.Create(t.Context(), vmprovider.Spec{ID: "a"})
		ok(t, err)
		inst, err := vmprovider.Wait(t.Context(), p, "a", func(i vmprovider.Instance) bool { return i.State == vmprovider.StateStopped })
		if err != nil || inst.Reason != "crashed" {
			t.Errorf("%+v, %v", inst, err)
		}
		if err := p.Hypervisor().Crash("a", "again"); !errors.Is(err, vmprovider.ErrNotFound) {
			t.Errorf("crash of a stopped machine: %v", err)
		}
		destroy(t, p, "a")
	})
}

func TestStuck(t *testing.T) {
	p := provider(memvm.Script{Stuck: 2})
	_, err := p.Create(t.Context(), vmprovider.Spec{ID: "a"})
	ok(t, err)
	for range 2 {
		if err := p.Destroy(t.Context(), "a", vmprovider.DestroyOptions{}); !errors.Is(err, memvm.ErrStuck) {
			t.Errorf("Destroy of a stuck machine: %v", err)
		}
		if inst, err := p.Get(t.Context(), "a"); err != nil || inst.State != vmprovider.StateLeftover {
			t.Errorf("stuck machine: %+v, %v", inst, err)
		}
	}
	destroy(t, p, "a")
	if _, err := p.Get(t.Context(), "a"); !errors.Is(err, vmprovider.ErrNotFound) {
		t.Errorf("after all: %v", err)
	}
}

func TestCreateErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("broken")
		for _, leave := range []bool{false, true} {
			p := provider(memvm.Script{CreateDelay: time.Minute, CreateError: broken, LeaveParts: leave})
			if _, err := p.Create(t.Context(), vmprovider.Spec{ID: "a"}); !errors.Is(err, broken) {
				t.Errorf("Create: %v", err)
			}
			if left := p.Hypervisor().Len() == 1; left != leave {
				t.Errorf("LeaveParts %v, left %v", leave, left)
			}
			destroy(t, p, "a")
		}
		// An orchestrator that dies in the middle leaves parts for the next.
		h := memvm.NewHypervisor(memvm.Config{Script: func(vmprovider.Spec) memvm.Script { return memvm.Script{CreateDelay: time.Minute} }})
		first, second := h.Open(), h.Open()
		created := make(chan error)
		go func() {
			_, err := first.Create(t.Context(), vmprovider.Spec{ID: "a"})
			created <- err
		}()
		synctest.Wait()
		if inst, err := second.Get(t.Context(), "a"); err != nil || inst.State != vmprovider.StateCreating {
			t.Errorf("while it is created: %+v, %v", inst, err)
		}
		ok(t, first.Close())
		if err := <-created; !errors.Is(err, vmprovider.ErrClosed) {
			t.Errorf("Create during Close: %v", err)
		}
		if inst, err := second.Get(t.Context(), "a"); err != nil || inst.State != vmprovider.StateLeftover {
			t.Errorf("what it left: %+v, %v", inst, err)
		}
		destroy(t, second, "a")
	})
}

func TestFault(t *testing.T) {
	calls := map[memvm.Call]int{}
	p := memvm.New(memvm.Config{Fault: func(_ context.Context, c memvm.Call, id string) error {
		if calls[c]++; calls[c] == 1 {
			return fmt.Errorf("%w: %s %s", vmprovider.ErrUnavailable, c, id)
		}
		return nil
	}})
	ctx := t.Context()
	do := map[memvm.Call]func() error{
		memvm.CallCreate: func() error { _, err := p.Create(ctx, vmprovider.Spec{ID: "a"}); return err },
		memvm.CallGet:    func() error { _, err := p.Get(ctx, "a"); return err },
		memvm.CallList: func() (err error) {
			for _, err = range p.List(ctx, vmprovider.ListOptions{}) {
				continue
			}
			return err
		},
		memvm.CallConsole: func() error {
			r, err := p.Console(ctx, "a", false)
			if err == nil {
				err = r.Close()
			}
			return err
		},
		memvm.CallWatch: func() (err error) {
			for _, err = range p.Watch(ctx) {
				break
			}
			return err
		},
		memvm.CallDestroy: func() error { return p.Destroy(ctx, "a", vmprovider.DestroyOptions{}) },
	}
	for _, c := range []memvm.Call{memvm.CallCreate, memvm.CallGet, memvm.CallList, memvm.CallConsole, memvm.CallWatch, memvm.CallDestroy} {
		if err := do[c](); !errors.Is(err, vmprovider.ErrUnavailable) {
			t.Errorf("first %s: %v", c, err)
		}
		if err := do[c](); err != nil {
			t.Errorf("second %s: %v", c, err)
		}
	}
}
