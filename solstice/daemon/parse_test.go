package daemon

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

type testFlags struct {
	Telemetry
	State
	HTTP
	AgentEndpoint
	GRPC
	Limit map[string]int `env:"LIMIT" help:"Limits."`
	Count int            `env:"COUNT" default:"1"`
	Run   struct {
		Job []string `help:"Jobs."`
	} `cmd:"" default:"1"`
}

func parseWith(t *testing.T, args, env []string) (testFlags, string, error) {
	t.Helper()
	if args == nil {
		args = []string{}
	}
	if env == nil {
		env = []string{}
	}
	var f testFlags
	var out bytes.Buffer
	_, err := Parse(&f, Program{Name: "solstice-test", Description: "Tests.", Args: args, Environ: env, Stdout: &out})
	return f, out.String(), err
}

func configFileWith(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "solstice.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestPrecedence(t *testing.T) {
	file := configFileWith(t, "count: 2\nlog-level: warn\n")
	for _, c := range []struct {
		name string
		args []string
		env  []string
		want int
	}{
		{"default", nil, nil, 1},
		{"file", []string{"--config", file}, nil, 2},
		{"variable over file", []string{"--config", file}, []string{"COUNT=3"}, 3},
		{"flag over all", []string{"--config", file, "--count=4"}, []string{"COUNT=3"}, 4},
		{"empty variable is none", []string{"--config", file}, []string{"COUNT="}, 2},
	} {
		f, _, err := parseWith(t, c.args, c.env)
		if err != nil || f.Count != c.want {
			t.Errorf("%s: count %d, %v; want %d", c.name, f.Count, err, c.want)
		}
	}
}

func TestProcessEnvironmentIsNotRead(t *testing.T) {
	t.Setenv("COUNT", "99")
	t.Setenv("LOG_FORMAT", "xml")
	f, _, err := parseWith(t, nil, []string{"HOME=/home/u"})
	if err != nil || f.Count != 1 {
		t.Errorf("count %d, %v: the process's environment was read beside the one given", f.Count, err)
	}
}

func TestDefaults(t *testing.T) {
	f, _, err := parseWith(t, nil, []string{"HOME=/home/u"})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, got, want string }{
		{"state-dir", f.StateDir, "/home/u/.local/state/solstice"},
		{"service-name", f.ServiceName, "solstice-test"},
		{"log-level", f.LogLevel, "info"},
		{"agent-addr", f.AgentAddr, "127.0.0.1:50052"},
		{"http-addr", f.HTTPAddr, "127.0.0.1:8080"},
	} {
		if c.got != c.want {
			t.Errorf("--%s defaults to %q, want %q", c.name, c.got, c.want)
		}
	}
	f, _, err = parseWith(t, nil, []string{"HOME=/home/u", "XDG_STATE_HOME=/var/lib"})
	if err != nil || f.StateDir != "/var/lib/solstice" {
		t.Errorf("with XDG_STATE_HOME: %q, %v", f.StateDir, err)
	}
	f, _, err = parseWith(t, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.State.Open(); err == nil {
		t.Error("without HOME, State.Open made a directory somewhere")
	}
}

func TestConfigFileTypes(t *testing.T) {
	file := configFileWith(t, `
# comment
orch-contact-addr: [10.0.0.1:1, 10.0.0.2:2]
limit: {a: 1, b: 2}
job: [x, y]
trace-ratio: 0.5
log-level:
`)
	f, _, err := parseWith(t, []string{"--config", file}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(f.OrchContactAddr, []string{"10.0.0.1:1", "10.0.0.2:2"}) || !reflect.DeepEqual(f.Limit, map[string]int{"a": 1, "b": 2}) ||
		!reflect.DeepEqual(f.Run.Job, []string{"x", "y"}) || f.TraceRatio != 0.5 || f.LogLevel != "info" {
		t.Errorf("got %+v", f)
	}
}

func TestWrongConfiguration(t *testing.T) {
	for _, c := range []struct {
		name string
		file string
		args []string
		env  []string
		want []string
	}{
		{"unknown keys", "count: 1\nlog_level: info\nnonsense: 1\n", nil, nil, []string{`solstice.yaml:2: unknown key "log_level" (did you mean "log-level"?)`, `solstice.yaml:3: unknown key "nonsense"`}},
		{"duplicate", "count: 1\ncount: 2\n", nil, nil, []string{`solstice.yaml:2: key "count" is there already in line 1`}},
		{"type in file", "\ncount: many\n", nil, nil, []string{"--count", "solstice.yaml:2:", "many"}},
		{"not a mapping", "- a\n", nil, nil, []string{"solstice.yaml:1:"}},
		{"not YAML", "a: [\n", nil, nil, []string{"solstice.yaml"}},
		{"documents", "count: 1\n---\ncount: 2\n", nil, nil, []string{"more than one"}},
		{"not for files", "config: x\n", nil, nil, []string{`unknown key "config"`}},
		{"type in variable", "", nil, []string{"COUNT=many"}, []string{"--count", "environment variable COUNT", "many"}},
		{"enum in variable", "", nil, []string{"LOG_FORMAT=xml"}, []string{"--log-format", "auto", "xml"}},
		{"unknown flag", "", []string{"--nonsense"}, nil, []string{"--nonsense"}},
		{"no such file", "", []string{"--config", "/nonexistent.yaml"}, nil, []string{"/nonexistent.yaml"}},
	} {
		args := c.args
		if c.file != "" {
			args = append(args, "--config", configFileWith(t, c.file))
		}
		_, _, err := parseWith(t, args, c.env)
		exit, ok := errors.AsType[*ExitError](err)
		if !ok || exit.Code != ExitUsage {
			t.Errorf("%s: error %v, want an ExitError of code %d", c.name, err, ExitUsage)
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q does not say %q", c.name, err, w)
			}
		}
	}
}

func TestHelpAndVersion(t *testing.T) {
	for _, flag := range []string{"--help", "--version"} {
		_, out, err := parseWith(t, []string{flag}, []string{"HOME=/home/u"})
		if exit, ok := errors.AsType[*ExitError](err); !ok || exit.Code != 0 || exit.Err != nil {
			t.Errorf("%s: error %v, want a silent exit with 0", flag, err)
		}
		if flag == "--version" {
			if strings.TrimSpace(out) != Version() {
				t.Errorf("--version prints %q, want %q", out, Version())
			}
			continue
		}
		flat := strings.Join(strings.Fields(out), " ")
		for _, want := range []string{"Tests.", "($LOG_LEVEL)", "($OTEL_EXPORTER_OTLP_ENDPOINT)", "($STATE_DIR)", "--agent-addr", "($GRPC_TLS_CERT)", "--config", "--version"} {
			if !strings.Contains(flat, want) {
				t.Errorf("--help does not show %q:\n%s", want, out)
			}
		}
	}
}

func TestSecret(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(" s3cret \r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		value, file, want string
		ok                bool
	}{
		{"", "", "", true},
		{"v", "", "v", true},
		{"", file, " s3cret ", true},
		{"v", file, "", false},
		{"", file + "x", "", false},
		{"", empty, "", false},
	} {
		got, err := Secret("token", c.value, c.file)
		if got != c.want || (err == nil) != c.ok {
			t.Errorf("Secret(%q, %q) = %q, %v", c.value, c.file, got, err)
		}
		if err != nil && strings.Contains(err.Error(), "s3cret") {
			t.Errorf("the error shows the secret: %v", err)
		}
	}
}

func TestTelemetryConfig(t *testing.T) {
	c, err := Telemetry{OTLP: "http://h:1", OTLPHeaders: "Authorization=Bearer a=b, x-y=z", TraceRatio: 0}.Config()
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(c.OTLP.Headers, map[string]string{"authorization": "Bearer a=b", "x-y": "z"}) || c.OTLP.TraceRatio >= 0 {
		t.Errorf("config %+v", c.OTLP)
	}
	if _, err := (Telemetry{OTLPHeaders: "hunter2"}).Config(); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("wrong headers: %v, want an error that does not show them", err)
	}
}

func TestAgentContacts(t *testing.T) {
	lis, contacts, err := AgentEndpoint{AgentAddr: "127.0.0.1:0"}.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lis.Close() }()
	if len(contacts) != 1 || contacts[0] != lis.Addr().String() {
		t.Errorf("contacts %v, want the listener's address %s", contacts, lis.Addr())
	}
	for _, bad := range []AgentEndpoint{
		{AgentAddr: "0.0.0.0:0"},
		{AgentAddr: "127.0.0.1:0", OrchContactAddr: []string{"host:1", "[::]:1"}},
		{AgentAddr: "127.0.0.1:0", OrchContactAddr: []string{":1"}},
		{AgentAddr: "127.0.0.1:0", OrchContactAddr: []string{"host"}},
		{AgentAddr: "127.0.0.1:0", OrchContactAddr: []string{"host:0"}},
	} {
		if lis, contacts, err := bad.Listen(t.Context()); err == nil {
			_ = lis.Close()
			t.Errorf("%+v: contacts %v were accepted", bad, contacts)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	for _, s := range []string{"", "a: 1", "a: [x]\nb: {c: d}", "a: &x 1\nb: *x", "? [a]\n: b", "<<: {a: 1}", "- a", "a: 1\na: 2"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parseConfig("f.yaml", data, []string{"a", "b"})
		if err != nil {
			return
		}
		for k := range c.values {
			if k != "a" && k != "b" {
				t.Errorf("key %q was let through", k)
			}
		}
	})
}
