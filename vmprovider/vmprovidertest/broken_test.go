package vmprovidertest_test

import (
	"maps"
	"testing"

	"github.com/solstice-ci/solstice-go/vmprovider/vmprovidertest"
)

// faults are ways to break a promise, by name.
type faults map[string]func(w *world, d *driver)

// TestBrokenDrivers: for every check, drivers that break the promise, each of
// which the check has to catch.
func TestBrokenDrivers(t *testing.T) {
	broken := map[string]faults{}
	for _, group := range []map[string]faults{brokenCalls, brokenProviders, brokenStreams} {
		maps.Copy(broken, group)
	}
	for _, c := range vmprovidertest.Checks() {
		faults := broken[c.Name]
		if len(faults) == 0 {
			t.Errorf("no broken driver shows that %s catches anything", c.Name)
		}
		for name, spoil := range faults {
			t.Run(c.Name+" "+name, func(t *testing.T) {
				t.Parallel()
				failures, applies := run(t, harness(capacity, spoil), c)
				if !applies {
					t.Fatal("the check does not apply")
				}
				if len(failures) == 0 {
					t.Error("the check passes")
				}
				t.Logf("%.200q", failures)
			})
		}
		delete(broken, c.Name)
	}
	for name := range broken {
		t.Errorf("broken drivers for %s, which is no check", name)
	}
}
