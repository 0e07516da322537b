package memvm_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
	"github.com/solstice-ci/solstice-go/vmprovider/vmprovidertest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const capacity = 5

// harness gives every check a hypervisor of its own, whose machines do what the
// label "script" says.
func harness(delay time.Duration) vmprovidertest.Harness {
	hypervisors := map[vmprovidertest.T]*memvm.Hypervisor{}
	hypervisor := func(t vmprovidertest.T) *memvm.Hypervisor {
		if hypervisors[t] == nil {
			hypervisors[t] = memvm.NewHypervisor(memvm.Config{
				Max: capacity,
				Script: func(s vmprovider.Spec) memvm.Script {
					sc := memvm.Script{CreateDelay: delay, Console: s.Labels["print"]}
					switch s.Labels["script"] {
					case "hang":
						sc.Hang = true
					case "exit":
						sc.Crash = time.Millisecond
					case "panic":
						sc.Agent = func(context.Context, memvm.Machine) error { return errors.New("kernel panic") }
					}
					return sc
				},
			})
		}
		return hypervisors[t]
	}
	script := func(name string) func(vmprovidertest.T, *vmprovider.Spec) {
		return func(_ vmprovidertest.T, s *vmprovider.Spec) { s.Labels = map[string]string{"script": name} }
	}
	return vmprovidertest.Harness{
		Open:       func(t vmprovidertest.T) vmprovider.Provider { return hypervisor(t).Open() },
		NeverBoots: script("hang"),
		ExitsEarly: script("exit"),
		Panics:     script("panic"),
		Prints: func(_ vmprovidertest.T, s *vmprovider.Spec, text string) {
			s.Labels = map[string]string{"print": text}
		},
		Leave: func(t vmprovidertest.T, id, owner string) {
			if err := hypervisor(t).Leave(id, owner); err != nil {
				t.Fatalf("Leave: %v", err)
			}
		},
		Capacity: capacity,
	}
}

func TestConformance(t *testing.T) {
	t.Run("instant", func(t *testing.T) { vmprovidertest.Run(t, harness(0)) })
	t.Run("slow", func(t *testing.T) { vmprovidertest.Run(t, harness(5*time.Millisecond)) })
}
