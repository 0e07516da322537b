package seed

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// shells are those that a guest's /bin/sh may be, or near to them: ksh93 is that
// of illumos, OpenBSD's has the same roots as mksh.
var shells = [][]string{{"dash"}, {"bash", "--posix"}, {"busybox", "ash"}, {"mksh"}, {"ksh93"}}

// The agent of these tests notes how it was started.
const agentScript = `#!/bin/sh
printf '%s\n' "$*" >args
ls -l bootstrap.json >mode
cp bootstrap.json seen.json
umask >mask
echo "the agent speaks"
echo "and complains" >&2
`

// tools are the programs that every guest has, and the script needs.
var tools = []string{"uname", "tr", "mkdir", "sleep", "rm", "chmod", "mv", "cat", "ls", "cp", "sh", "printf"}

// guest is a place where the script runs: a search path of its own, and a server
// to download from.
type guest struct {
	t       *testing.T
	path    string
	options Options
	edits   []string // pairs of what is in the script once, and what is there instead
	server  *httptest.Server
	asked   atomic.Int64
	answer  func(w http.ResponseWriter, n int64) // to the n-th request
}

func newGuest(t *testing.T, programs ...string) *guest {
	t.Helper()
	base := t.TempDir()
	g := &guest{t: t, path: filepath.Join(base, "bin"), options: Options{dir: filepath.Join(base, "var", "solstice"), console: filepath.Join(base, "console"), waits: "0 0 0", patience: 300}}
	if err := os.WriteFile(g.options.console, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(g.path, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, p := range append(tools, programs...) {
		g.link(p, p)
	}
	g.answer = func(w http.ResponseWriter, _ int64) { _, _ = w.Write([]byte(agentScript)) }
	g.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := g.asked.Add(1)
		if r.URL.Path != "/runner/"+runtime.GOOS+"/"+runtime.GOARCH {
			http.NotFound(w, r)
			return
		}
		g.answer(w, n)
	}))
	t.Cleanup(g.server.Close)
	return g
}

// link puts a program of this machine into the search path under a name.
func (g *guest) link(program, name string) {
	g.t.Helper()
	exe, err := exec.LookPath(program)
	if err != nil {
		testenv.Missing(g.t, program, ".mise/tasks/setup/packages installs it")
	}
	if err := os.Symlink(exe, filepath.Join(g.path, name)); err != nil {
		g.t.Fatal(err)
	}
}

// fake puts a script into the search path.
func (g *guest) fake(name, script string) {
	g.t.Helper()
	if err := os.WriteFile(filepath.Join(g.path, name), []byte("#!/bin/sh\n"+script), 0o755); err != nil { //nolint:gosec // a program
		g.t.Fatal(err)
	}
}

func (g *guest) bootstrap() vmprovider.Bootstrap {
	sum := sha256.Sum256([]byte(agentScript))
	b := bootstrap()
	b.RunnerURL = g.server.URL + "/runner"
	b.AgentSHA256 = map[string]string{runtime.GOOS + "/" + runtime.GOARCH: hex.EncodeToString(sum[:]), "plan9/386": agentSum}
	return b
}

// start runs the script in a shell; end waits for it and returns what the console
// shows.
func (g *guest) start(shell []string, b vmprovider.Bootstrap) (end func() (console string, err error)) {
	g.t.Helper()
	script := scriptOf(g.t, b, g.options)
	edits := append([]string{":/usr/sbin:/sbin:/usr/local/bin:/usr/pkg/bin\n", "\n"}, g.edits...) // this machine's programs stay out
	for i := 0; i < len(edits); i += 2 {
		if strings.Count(script, edits[i]) != 1 {
			g.t.Fatalf("the script has %d times %q, want once", strings.Count(script, edits[i]), edits[i])
		}
		script = strings.Replace(script, edits[i], edits[i+1], 1)
	}
	file := filepath.Join(filepath.Dir(g.path), "user-data")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		g.t.Fatal(err)
	}
	exe, err := exec.LookPath(shell[0])
	if err != nil {
		testenv.Missing(g.t, shell[0], ".mise/tasks/setup/packages installs it")
	}
	cmd := exec.Command(exe, append(shell[1:], file)...)
	cmd.Env = []string{"PATH=" + g.path, "http_proxy=http://127.0.0.1:1"}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	return func() (string, error) {
		err := cmd.Wait()
		said, rerr := os.ReadFile(g.options.console)
		if rerr != nil && !errors.Is(rerr, syscall.EISDIR) {
			g.t.Fatal(rerr)
		}
		return string(said) + out.String(), err
	}
}

// boot runs the script to its end.
func (g *guest) boot(shell []string, b vmprovider.Bootstrap) (console string, err error) {
	g.t.Helper()
	return g.start(shell, b)()
}

// started checks what the agent was given.
func (g *guest) started(b vmprovider.Bootstrap) {
	g.t.Helper()
	read := func(name string) string {
		content, err := os.ReadFile(filepath.Join(g.options.dir, name))
		if err != nil {
			g.t.Error(err)
		}
		return string(content)
	}
	if got, want := read("args"), "--bootstrap "+g.options.dir+"/bootstrap.json --poweroff\n"; got != want {
		g.t.Errorf("arguments %q, want %q", got, want)
	}
	if mode := read("mode"); !strings.HasPrefix(mode, "-rw------- ") {
		g.t.Errorf("the file with the token: %s", mode)
	}
	if mask := strings.TrimLeft(read("mask"), "0"); mask != "22\n" {
		g.t.Errorf("the agent's umask: %s", mask)
	}
	for dir, want := range map[string]os.FileMode{g.options.dir: 0o700, filepath.Dir(g.options.dir): 0o755} {
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != want {
			g.t.Errorf("%s: %v, %v; want %v", dir, info.Mode(), err, want)
		}
	}
	var got struct {
		Contacts []string
		CA       []byte
		Token    string
	}
	if err := json.Unmarshal([]byte(read("seen.json")), &got); err != nil || got.Token != b.Token || string(got.CA) != string(b.CA) || !reflect.DeepEqual(got.Contacts, b.Contacts) {
		g.t.Errorf("bootstrap %+v, %v", got, err)
	}
}

// TestScript runs it in each shell with each of the programs that a guest may have.
func TestScript(t *testing.T) {
	for _, shell := range shells {
		for name, equip := range map[string]func(g *guest){
			"curl":          func(g *guest) { g.link("curl", "curl"); g.link("sha256sum", "sha256sum") },
			"wget, openssl": func(g *guest) { g.link("wget", "wget"); g.link("openssl", "openssl") },
			"busybox":       func(g *guest) { g.link("busybox", "wget"); g.link("busybox", "sha256sum") },
			"FreeBSD": func(g *guest) {
				g.link("curl", "real")
				g.fake("fetch", `[ "$1 $2" = "-q -o" ] && [ $# = 4 ] && exec real -sf -o "$3" "$4"`)
				g.link("sha256sum", "sum")
				g.fake("sha256", `[ "$1" = -q ] && set -- $(sum "$2") && echo "$1"`)
			},
			"OpenBSD": func(g *guest) {
				g.link("curl", "real")
				g.fake("ftp", `[ "$1 $2" = "-V -o" ] && [ $# = 4 ] && exec real -sf -o "$3" "$4"`)
				g.link("sha256sum", "sum")
				g.fake("sha256", `[ "$1" = -q ] && set -- $(sum "$2") && echo "$1"`)
			},
			"illumos": func(g *guest) {
				g.link("curl", "curl")
				g.link("sha256sum", "sum")
				g.fake("digest", `[ "$1 $2" = "-a sha256" ] && set -- $(sum "$3") && echo "$1"`)
			},
		} {
			t.Run(shell[0]+"/"+name, func(t *testing.T) {
				t.Parallel()
				g := newGuest(t)
				equip(g)
				b := g.bootstrap()
				console, err := g.boot(shell, b)
				if err != nil || !strings.Contains(console, "solstice: starting the agent\nthe agent speaks\nand complains\n") || strings.Contains(console, b.Token) {
					t.Fatalf("%v\n%s", err, console)
				}
				g.started(b)
			})
		}
	}
}

// TestSystems: the names that systems give themselves.
func TestSystems(t *testing.T) {
	for said, want := range map[[2]string]string{
		{"SunOS", "i86pc"}: "illumos/amd64", {"FreeBSD", "amd64"}: "freebsd/amd64", {"OpenBSD", "amd64"}: "openbsd/amd64",
		{"NetBSD", "amd64"}: "netbsd/amd64", {"Linux", "x86_64"}: "linux/amd64", {"Linux", "aarch64"}: "linux/arm64",
		{"Linux", "riscv64"}: "linux/riscv64", {"NetBSD", "evbarm"}: "netbsd/arm64", {"FreeBSD", "arm64"}: "freebsd/arm64",
	} {
		g := newGuest(t, "curl", "sha256sum")
		if err := os.Remove(filepath.Join(g.path, "uname")); err != nil {
			t.Fatal(err)
		}
		g.fake("uname", fmt.Sprintf("case $1 in -s) echo %s ;; -m) echo %s ;; -p) echo aarch64 ;; esac", said[0], said[1]))
		b := g.bootstrap()
		b.AgentSHA256 = map[string]string{"plan9/386": agentSum}
		if console, err := g.boot(shells[0], b); err == nil || console != "solstice: there is no agent for "+want+"\n" {
			t.Errorf("%v: %v\n%s", said, err, console)
		}
	}
}

// TestFaults: what passes is waited for, what does not is said.
func TestFaults(t *testing.T) {
	whole := func(w http.ResponseWriter) { _, _ = w.Write([]byte(agentScript)) }
	missing := func(w http.ResponseWriter, _ int64) { w.WriteHeader(http.StatusNotFound) }
	for name, c := range map[string]struct {
		programs []string
		answer   func(w http.ResponseWriter, n int64)
		change   func(b *vmprovider.Bootstrap)
		want     string // on the console where it fails; empty: it starts
	}{
		"not there at first": {answer: func(w http.ResponseWriter, n int64) {
			if n < 3 {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			whole(w)
		}},
		"cut in the middle": {answer: func(w http.ResponseWriter, n int64) {
			if n == 1 {
				w.Header().Set("Content-Length", "1000")
				_, _ = w.Write([]byte(agentScript[:20]))
				return
			}
			whole(w)
		}},
		"another file at first": {answer: func(w http.ResponseWriter, n int64) {
			if n == 1 {
				_, _ = w.Write([]byte("#!/bin/sh\necho another one\n"))
				return
			}
			whole(w)
		}},
		"another file":             {answer: func(w http.ResponseWriter, _ int64) { _, _ = w.Write([]byte("#!/bin/sh\necho another one\n")) }, want: "its SHA-256 is "},
		"never there":              {answer: missing, want: "giving up: no agent"},
		"curl's reason":            {answer: missing, want: "not fetched: curl: (22) The requested URL returned error: 404"},
		"wget's reason":            {programs: []string{"wget", "sha256sum"}, answer: missing, want: "ERROR 404: Not Found."},
		"no server":                {change: func(b *vmprovider.Bootstrap) { b.RunnerURL = "http://127.0.0.1:1/runner" }, want: "giving up: no agent"},
		"nothing to download with": {programs: []string{"sha256sum"}, want: "solstice: no curl, wget, fetch or ftp to download the agent with\n"},
		"nothing to hash with":     {programs: []string{"curl"}, want: "solstice: no sha256sum, "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if c.programs == nil {
				c.programs = []string{"curl", "sha256sum"}
			}
			g := newGuest(t, c.programs...)
			if c.answer != nil {
				g.answer = c.answer
			}
			b := g.bootstrap()
			if c.change != nil {
				c.change(&b)
			}
			console, err := g.boot(shells[0], b)
			if c.want == "" {
				if err != nil {
					t.Fatalf("%v\n%s", err, console)
				}
				g.started(b)
				return
			}
			if err == nil || !strings.Contains(console, "solstice: ") || !strings.Contains(console, c.want) || strings.Contains(console, "another one") {
				t.Errorf("%v\n%s", err, console)
			}
			if _, err := os.Stat(filepath.Join(g.options.dir, "args")); err == nil {
				t.Error("something was started")
			}
		})
	}
}

// TestStalled: a download that brings nothing, from the beginning or from the
// middle on, is ended and tried again, whatever the program.
func TestStalled(t *testing.T) {
	t.Parallel()
	var ends []func()
	for i, shell := range shells {
		for name, program := range map[string]string{"curl": "curl", "wget": "wget", "busybox": "wget"} {
			if i > 0 && name != "busybox" {
				continue // one shell with each, each with the one that has no time-out
			}
			g := newGuest(t, "sha256sum")
			g.link(name, program)
			g.options.patience, g.options.waits = 1, strings.Repeat("0 ", 50) // enough for a machine that is slow itself
			ended := make(chan struct{})
			g.answer = func(w http.ResponseWriter, n int64) {
				if n > 2 {
					_, _ = w.Write([]byte(agentScript))
					return
				}
				if n == 2 {
					w.Header().Set("Content-Length", "100000")
					_, _ = w.Write([]byte(agentScript))
					_ = http.NewResponseController(w).Flush()
				}
				<-ended
			}
			b := g.bootstrap()
			end := g.start(shell, b)
			ends = append(ends, func() {
				console, err := end()
				close(ended)
				if err != nil || strings.Count(console, "solstice: the agent was not fetched: nothing came for 1 s\n") < 2 {
					t.Errorf("%s, %s: %v\n%s", shell[0], name, err, console)
					return
				}
				g.started(b)
			})
		}
	}
	for _, end := range ends { // all of them wait at once
		end()
	}
}

// TestConsole: one that cannot be opened is done without, and what was there
// before, such as a file of the token that everybody may read, is replaced.
func TestConsole(t *testing.T) {
	for _, shell := range shells {
		t.Run(shell[0], func(t *testing.T) {
			t.Parallel()
			g := newGuest(t, "curl", "sha256sum")
			g.options.console = filepath.Dir(g.path)                                                                          // a directory, which root cannot write to either
			if err := errors.Join(os.Mkdir(filepath.Dir(g.options.dir), 0o755), os.Mkdir(g.options.dir, 0o700)); err != nil { //nolint:gosec // as /var/lib
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(g.options.dir, "bootstrap.json"), []byte("old"), 0o644); err != nil { //nolint:gosec // what must not last
				t.Fatal(err)
			}
			b := g.bootstrap()
			out, err := g.boot(shell, b)
			if err != nil || !strings.Contains(out, "solstice: starting the agent\nthe agent speaks\nand complains\n") || strings.Count(out, "\n") != 4 {
				t.Fatalf("%v\n%s", err, out)
			}
			g.started(b)
		})
	}
}

// FuzzUserData: whatever the values are, the script that is made of them hands
// them over, and runs nothing of them.
func FuzzUserData(f *testing.F) {
	f.Add("token", "10.0.2.2:1", "sol-1", "http://host/runner")
	f.Add("'; reboot #", "[::1]:1", "a", "http://host/$(reboot)")
	f.Add("`reboot`\\", "h:1", "x.y", "https://h:1/a'b")
	f.Add("solstice-bootstrap", "solstice-bootstrap:1", "solstice-bootstrap", "http://solstice-bootstrap")
	dash, err := exec.LookPath("dash")
	if err != nil {
		testenv.Missing(f, "dash", ".mise/tasks/setup/packages installs it")
	}
	f.Fuzz(func(t *testing.T, token, contact, instance, url string) {
		b := bootstrap()
		b.Token, b.Contacts, b.InstanceID, b.Hostname, b.RunnerURL = token, []string{contact}, instance, instance, url
		o := Options{}
		o.fill()
		script, err := userData(b, o)
		if err != nil {
			return
		}
		// The values alone, with nothing to run but cat.
		text := string(script)
		i, j := strings.Index(text, "url="), strings.Index(text, "\npatience=")
		k, l := strings.Index(text, "(umask 077"), strings.LastIndex(text, "\nsay ")
		heredoc := strings.Replace(text[k:l], "(umask 077 && cat >bootstrap.json)", "cat", 1)
		heredoc = strings.Replace(heredoc, `|| fail "cannot write to $dir"`, "", 1)
		cmd := exec.Command(dash, "-c", text[i:j]+"\nprintf '%s\\n' \"$url\"\n"+heredoc)
		cmd.Env = []string{"PATH=/bin"}
		out, err := cmd.CombinedOutput()
		said, conf, _ := strings.Cut(string(out), "\n")
		var got struct {
			Contacts []string
			Token    string
		}
		if jerr := json.Unmarshal([]byte(conf), &got); err != nil || jerr != nil || said != strings.TrimSuffix(url, "/") || got.Token != token || got.Contacts[0] != contact {
			t.Fatalf("%v, %v: %s", err, jerr, out)
		}
	})
}
