package processvm_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/processvm"
	"github.com/solstice-ci/solstice-go/vmprovider/vmprovidertest"
)

func TestConformance(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const capacity = 5
	process := processvm.Config{Command: []string{exe, "fake-agent"}, Max: capacity}
	inside := processvm.Config{Runner: runner, Max: capacity}
	descent, insideDescent := process, inside
	descent.NoCgroup, insideDescent.NoCgroup = true, true
	for name, cfg := range map[string]processvm.Config{
		"cgroup": process, "descent": descent, "inside, cgroup": inside, "inside, descent": insideDescent,
	} {
		t.Run(name, func(t *testing.T) {
			roots := map[vmprovidertest.T]string{}
			root := func(s vmprovidertest.T) string {
				if roots[s] == "" {
					roots[s] = t.TempDir()
				}
				return roots[s]
			}
			behaves := func(as string) func(vmprovidertest.T, *vmprovider.Spec) {
				return func(_ vmprovidertest.T, s *vmprovider.Spec) { s.Bootstrap.Hostname = as }
			}
			current := map[vmprovidertest.T]*processvm.Provider{}
			vmprovidertest.Run(t, vmprovidertest.Harness{
				Open: func(s vmprovidertest.T) vmprovider.Provider {
					// Machines inside this process are one provider's alone.
					if p := current[s]; p != nil && cfg.Runner != nil {
						if _, err := p.Get(context.Background(), "absent"); !errors.Is(err, vmprovider.ErrClosed) {
							return p
						}
					}
					cfg := cfg
					cfg.Root = root(s)
					p, err := processvm.New(cfg)
					if err != nil {
						s.Fatalf("New: %v", err)
					}
					current[s] = p
					return p
				},
				NeverBoots: behaves("idle"),
				ExitsEarly: behaves("exit"),
				Panics:     behaves("panic"),
				Prints: func(_ vmprovidertest.T, s *vmprovider.Spec, text string) {
					s.Bootstrap.Hostname, s.Bootstrap.RunnerURL = "print", text
				},
				Leave: func(s vmprovidertest.T, id, owner string) {
					dir := filepath.Join(root(s), id)
					b, err := json.Marshal(map[string]any{"id": id, "owner": owner, "creator": map[string]any{"pid": 1, "start": "long-ago"}})
					if err == nil {
						err = os.Mkdir(dir, 0o700)
					}
					if err == nil {
						err = os.WriteFile(filepath.Join(dir, "machine.json"), b, 0o600)
					}
					if err != nil {
						s.Fatalf("Leave: %v", err)
					}
				},
				Capacity: capacity,
			})
		})
	}
}

// runner is what fake-agent is, inside this process.
func runner(ctx context.Context, bootstrap []byte, console io.Writer) error {
	var boot processvm.BootstrapFile
	if err := json.Unmarshal(bootstrap, &boot); err != nil {
		return err
	}
	switch boot.Hostname {
	case "exit":
		return errors.New("bye")
	case "panic":
		return errors.New("oh")
	case "print":
		if _, err := io.WriteString(console, boot.RunnerURL); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return context.Cause(ctx)
}
