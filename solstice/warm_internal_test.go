package solstice

import (
	"testing"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// TestRecipe: whatever machines are made from tells those of before apart, but for
// where the same image is.
func TestRecipe(t *testing.T) {
	pool := Pool{Image: vmprovider.Image{Path: "/a", Digest: "sha256:1", Format: "raw"}, CPUs: 1, MemoryBytes: 2, DiskBytes: 3, AgentSHA256: map[string]string{"linux/amd64": "4"}, Recipe: "isolation: none"}
	before := pool.recipe()
	moved := pool
	moved.Image.Path = "/b"
	if moved.recipe() != before {
		t.Error("the same image at another place counts as another")
	}
	for name, edit := range map[string]func(*Pool){
		"image":  func(p *Pool) { p.Image.Digest = "sha256:2" },
		"format": func(p *Pool) { p.Image.Format = "qcow2" },
		"path":   func(p *Pool) { p.Image = vmprovider.Image{Path: "/b", Format: "raw"} },
		"CPUs":   func(p *Pool) { p.CPUs = 2 },
		"memory": func(p *Pool) { p.MemoryBytes = 3 },
		"disk":   func(p *Pool) { p.DiskBytes = 4 },
		"agent":  func(p *Pool) { p.AgentSHA256 = map[string]string{"linux/amd64": "5"} },
		"recipe": func(p *Pool) { p.Recipe = "isolation: strict" },
	} {
		p := pool
		edit(&p)
		if p.recipe() == before {
			t.Errorf("another %s does not count", name)
		}
	}
}
