package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
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

// Handler serves the agents; see [RunnerHandler].
func (r Runner) Handler(stateDir string) http.Handler {
	if r.RunnerDir != "" {
		return RunnerHandler(r.RunnerDir)
	}
	return RunnerHandler(filepath.Join(stateDir, "runner"))
}

// platform is one path element of an operating system or architecture.
var platform = regexp.MustCompile(`^[a-z0-9]{1,16}$`)

// RunnerHandler serves the files agent-OS-ARCH of a directory as
// /runner/OS/ARCH, and as /runner/OS/ARCH.sha256 the hex SHA-256 of each, and
// nothing else. Files may be replaced while it serves.
func RunnerHandler(dir string) http.Handler {
	h := &runnerHandler{dir: dir, sums: map[string]fileSum{}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /runner/{os}/{arch}", h.serve)
	return mux
}

type runnerHandler struct {
	dir string

	mu   sync.Mutex // also held while a sum is made: one at a time is enough
	sums map[string]fileSum
}

type fileSum struct {
	stamp fileStamp
	hex   string
}

func (h *runnerHandler) serve(w http.ResponseWriter, r *http.Request) {
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
	f, err := os.Open(filepath.Join(h.dir, name))
	if err != nil {
		http.NotFound(w, r)
		return
	}
	defer func() { _ = f.Close() }() // only read from
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		http.NotFound(w, r)
		return
	}
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

func (h *runnerHandler) sum(name string, f io.Reader, stamp fileStamp) (string, error) {
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
