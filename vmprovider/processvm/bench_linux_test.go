package processvm

import (
	"fmt"
	"os"
	"testing"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// BenchmarkMachine is the life of a machine: created, and destroyed.
func BenchmarkMachine(b *testing.B) {
	for _, noCgroup := range []bool{false, true} {
		b.Run(fmt.Sprintf("cgroup=%v", !noCgroup), func(b *testing.B) {
			exe, err := os.Executable()
			if err != nil {
				b.Fatal(err)
			}
			p, err := New(Config{Root: b.TempDir(), Command: []string{exe, "fake-agent"}, NoCgroup: noCgroup})
			if err != nil {
				b.Fatal(err)
			}
			defer p.Close()
			n := 0
			for b.Loop() {
				n++
				id := fmt.Sprintf("b-%d-%d", os.Getpid(), n)
				if _, err := p.Create(b.Context(), spec(id, "")); err != nil {
					b.Fatal(err)
				}
				if err := p.Destroy(b.Context(), id, vmprovider.DestroyOptions{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
