package telemetry

import (
	"log/slog"
	"testing"
)

func TestFilterLevels(t *testing.T) {
	for _, c := range []struct {
		filter, pkg string
		want        slog.Level
	}{
		{"info", "queue", slog.LevelInfo},
		{"debug", "", slog.LevelDebug},
		{"queue=debug", "blobstore", slog.LevelInfo},
		{"warn,queue=debug", "queue", slog.LevelDebug},
		{"warn,queue=debug", "queue/sqlqueue", slog.LevelDebug},
		{"warn,queue=debug", "queuetest", slog.LevelWarn},
		{"warn,queue=debug,queue/sqlqueue=error", "queue/sqlqueue", slog.LevelError},
		{"queue/sqlqueue=error,queue=debug", "queue/sqlqueue/inner", slog.LevelError},
		{" INFO , queue = Trace ", "queue", slog.LevelDebug - 4},
		{"info,github.com/solstice-ci/solstice-go/queue=debug", "queue", slog.LevelDebug},
		{"info,queue=debug", "github.com/solstice-ci/solstice-go/queue", slog.LevelDebug},
		{"info,example.com/ci=debug", "example.com/ci/forge", slog.LevelDebug},
		{"off,main=info", "main", slog.LevelInfo},
	} {
		f, err := ParseFilter(c.filter)
		if err != nil {
			t.Errorf("ParseFilter(%q): %v", c.filter, err)
			continue
		}
		if got := f.Level(c.pkg); got != c.want {
			t.Errorf("ParseFilter(%q).Level(%q) = %v, want %v", c.filter, c.pkg, got, c.want)
		}
		if f.lowest() > c.want {
			t.Errorf("ParseFilter(%q).lowest() = %v, above %v", c.filter, f.lowest(), c.want)
		}
	}
	for _, bad := range []string{"", "loud", "info,", "info,debug", "queue=", "=debug", "queue=debug,queue=info"} {
		if _, err := ParseFilter(bad); err == nil {
			t.Errorf("ParseFilter(%q) did not fail", bad)
		}
	}
}

func TestPackageOf(t *testing.T) {
	for function, want := range map[string]string{
		"main.main": "main",
		"github.com/solstice-ci/solstice-go/queue.(*Consumer).Run.func1": "queue",
		"github.com/solstice-ci/solstice-go/queue/sqlqueue.New":          "queue/sqlqueue",
		"gopkg.in/yaml%2ev3.Parse":                                       "gopkg.in/yaml.v3",
		"example.com/a.b/c.F[...]":                                       "example.com/a.b/c",
	} {
		if got := packageOf(function); got != want {
			t.Errorf("packageOf(%q) = %q, want %q", function, got, want)
		}
	}
}

func FuzzParseFilter(f *testing.F) {
	for _, s := range []string{"info", "info,queue=debug", "=", ",,", "a=b=c", "off,x/y=warn"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		filter, err := ParseFilter(s)
		if err != nil {
			return
		}
		if got := filter.Level("no/such/package"); got < filter.lowest() {
			t.Errorf("a package is logged from %v, below the lowest level %v", got, filter.lowest())
		}
	})
}
