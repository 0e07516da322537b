package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"
)

// Runner are the flags of the listener where guests download the agent.
type Runner struct {
	RunnerAddr string `group:"Listeners" env:"RUNNER_ADDR" default:"127.0.0.1:50053" help:"Address where guests download the agent, over plain HTTP."`
	RunnerDir  string `group:"Listeners" env:"RUNNER_DIR" placeholder:"DIR" help:"Directory with the agents, named agent-OS-ARCH. Default: runner in the state directory."`
	RunnerURL  string `group:"Listeners" name:"runner-url" env:"SOLSTICE_RUNNER_URL" placeholder:"URL" help:"What guests download from; /OS/ARCH is appended. Default: /runner at --runner-addr."`
}

// Listen opens the listener and returns the URL to tell guests.
func (r Runner) Listen(ctx context.Context) (net.Listener, string, error) {
	lis, err := listen(ctx, "runner-addr", r.RunnerAddr)
	if err != nil {
		return nil, "", err
	}
	if r.RunnerURL != "" {
		return lis, r.RunnerURL, nil
	}
	return lis, "http://" + lis.Addr().String() + "/runner", nil
}

// Agents are those in --runner-dir.
func (r Runner) Agents(stateDir string) *Agents {
	if r.RunnerDir != "" {
		return NewAgents(r.RunnerDir)
	}
	return NewAgents(filepath.Join(stateDir, "runner"))
}

// platform is one path element of an operating system or architecture.
var platform = regexp.MustCompile(`^[a-z0-9]{1,16}$`)

// Agents are the agents that guests download: the files agent-OS-ARCH of a
// directory. Files may be replaced at any time.
type Agents struct {
	dir string

	mu   sync.Mutex // also held while a sum is made: one at a time is enough
	sums map[string]fileSum
}

// NewAgents are the agents in a directory, which may be empty or missing.
func NewAgents(dir string) *Agents { return &Agents{dir: dir, sums: map[string]fileSum{}} }

// Dir is their directory.
func (h *Agents) Dir() string { return h.dir }

// Handler serves each as /runner/OS/ARCH, and as /runner/OS/ARCH.sha256 its hex
// SHA-256, and nothing else.
func (h *Agents) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /runner/{os}/{arch}", h.serve)
	return mux
}

// Sums are the hex SHA-256 of all that there are now, by "os/arch".
func (h *Agents) Sums() (map[string]string, error) {
	names, err := filepath.Glob(filepath.Join(h.dir, "agent-*-*"))
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, name := range names {
		name = filepath.Base(name)
		goos, arch, _ := strings.Cut(strings.TrimPrefix(name, "agent-"), "-")
		if !platform.MatchString(goos) || !platform.MatchString(arch) {
			continue
		}
		f, info, err := h.open(name)
		if err != nil {
			return nil, err
		}
		out[goos+"/"+arch], err = h.sum(name, f, fileStamp{info.Size(), info.ModTime()})
		_ = f.Close() // only read from
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (h *Agents) open(name string) (*os.File, fs.FileInfo, error) {
	f, err := os.Open(filepath.Join(h.dir, name))
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no file", f.Name())
	}
	if err != nil {
		_ = f.Close() // only read from
		return nil, nil, err
	}
	return f, info, nil
}

type fileSum struct {
	stamp fileStamp
	hex   string
}

func (h *Agents) serve(w http.ResponseWriter, r *http.Request) {
	goos, arch := r.PathValue("os"), r.PathValue("arch")
	sum := false
	if cut, ok := strings.CutSuffix(arch, ".sha256"); ok {
		arch, sum = cut, true
	}
	if !platform.MatchString(goos) || !platform.MatchString(arch) {
		http.NotFound(w, r)
		return
	}
	name := "agent-" + goos + "-" + arch
	f, info, err := h.open(name)
	if err != nil {
		http.NotFound(w, r)
		return
	}
	defer func() { _ = f.Close() }() // only read from
	if !sum {
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, name, info.ModTime(), f)
		return
	}
	digest, err := h.sum(name, f, fileStamp{info.Size(), info.ModTime()})
	if err != nil {
		http.Error(w, "cannot be read", http.StatusInternalServerError)
		return
	}
	_, _ = fmt.Fprintln(w, digest)
}

func (h *Agents) sum(name string, f io.Reader, stamp fileStamp) (string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s, ok := h.sums[name]; ok && s.stamp == stamp {
		return s.hex, nil
	}
	d := sha256.New()
	if _, err := io.Copy(d, f); err != nil {
		return "", err
	}
	s := fileSum{stamp, hex.EncodeToString(d.Sum(nil))}
	h.sums[name] = s // as many as there are files
	return s.hex, nil
}

// HTTPServer has the bounds of a server whose clients are not trusted; an answer
// may take 10 minutes.
func HTTPServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: 10 * time.Minute,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
}
