package nearest_test

import (
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/nearest"
)

func TestTo(t *testing.T) {
	names := []string{"debian-12", "debian-13", "illumos", "log-level", "il"}
	for got, want := range map[string]string{
		"debain-12": "debian-12", "li": "il", "ilumos": "illumos", "DEBIAN_13": "debian-13", "illumo": "illumos", "log_level": "log-level",
		"windows": "", "": "", strings.Repeat("x", 1000): "",
	} {
		if n := nearest.To(got, names); n != want {
			t.Errorf("To(%.20q) = %q, want %q", got, n, want)
		}
	}
}
