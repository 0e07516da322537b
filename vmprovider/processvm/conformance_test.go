package processvm_test

import (
	"encoding/json"
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
	for name, noCgroup := range map[string]bool{"cgroup": false, "descent": true} {
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
			vmprovidertest.Run(t, vmprovidertest.Harness{
				Open: func(s vmprovidertest.T) vmprovider.Provider {
					p, err := processvm.New(processvm.Config{
						Root: root(s), Command: []string{exe, "fake-agent"}, Max: capacity, NoCgroup: noCgroup,
					})
					if err != nil {
						s.Fatalf("New: %v", err)
					}
					return p
				},
				NeverBoots: behaves("idle"),
				ExitsEarly: behaves("exit"),
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
