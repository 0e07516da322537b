package pools

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/image"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
	"github.com/solstice-ci/solstice-go/vmprovider/remotevm"
)

// recorder is a plugin's provider that keeps what it was asked for.
type recorder struct {
	vmprovider.Provider
	mu    sync.Mutex
	specs []vmprovider.Spec
}

func (r *recorder) Create(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
	r.mu.Lock()
	r.specs = append(r.specs, s)
	r.mu.Unlock()
	return r.Provider.Create(ctx, s)
}

func (r *recorder) last() vmprovider.Spec {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.specs[len(r.specs)-1]
}

// served has a plugin at a Unix socket until the test ends.
func served(t *testing.T) (*recorder, string) {
	t.Helper()
	r := &recorder{Provider: memvm.New(memvm.Config{})}
	at := filepath.Join(t.TempDir(), "s")
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() {
		ended <- remotevm.Serve(ctx, "unix:"+at, remotevm.NewServer(r, remotevm.ServerOptions{Name: "test"}), nil)
	}()
	t.Cleanup(func() {
		stop()
		if err := errors.Join(<-ended, r.Close()); err != nil {
			t.Error(err)
		}
	})
	for {
		if c, err := net.Dial("unix", at); err == nil {
			_ = c.Close()
			return r, at
		}
		time.Sleep(time.Millisecond)
	}
}

func put(t *testing.T, name, content string) (sum string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
	s := sha256.Sum256([]byte(content))
	return hex.EncodeToString(s[:])
}

func TestMachines(t *testing.T) {
	plugin, at := served(t)
	dir := t.TempDir()
	imageSum := put(t, filepath.Join(dir, "disk.raw"), "a disk")
	agentSum := put(t, filepath.Join(dir, "runner/agent-linux-amd64"), "an agent")
	put(t, filepath.Join(dir, "runner/agent-Of-nothing"), "ignored: no system has this name")
	put(t, filepath.Join(dir, "images.yaml"), fmt.Sprintf("images: { one: { source: disk.raw, sha256: %s, format: raw, os: linux, arch: amd64 } }", imageSum))
	store, err := image.Open(filepath.Join(dir, "images"), image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	earlier := image.Image{Label: "earlier", Source: filepath.Join(dir, "earlier.raw"), Format: "raw", OS: "linux", Arch: "amd64"}
	earlier.SHA256 = put(t, earlier.Source, "a disk that nobody uses")
	if _, err := store.Ensure(t.Context(), earlier, nil); err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dir, "pools.yaml"), fmt.Sprintf(`
catalogue: images.yaml
image_dir: images
image_max_size: 16
pools:
  vms: { provider: 'grpc+unix:%s', image: one, cpus: 2, memory: 1GiB, warm: 1, contacts: ['10.1.1.1:7'], runner_url: 'http://10.1.1.1:8/runner' }
`, at))
	f, err := ReadFile(filepath.Join(dir, "pools.yaml"), "")
	if err != nil {
		t.Fatal(err)
	}
	set, err := f.Open(t.Context(), Options{Agents: daemon.NewAgents(filepath.Join(dir, "runner")), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := set.Close(); err != nil {
			t.Error(err)
		}
	}()
	pools, err := set.Pools(Endpoints{Contacts: []string{"127.0.0.1:1"}, RunnerURL: "http://127.0.0.1:2/runner"})
	if err != nil {
		t.Fatal(err)
	}
	p := pools[0]
	if p.Name != "vms" || p.CPUs != 2 || p.MemoryBytes != 1<<30 || p.Warm != 1 || p.Contacts[0] != "10.1.1.1:7" || p.RunnerURL != "http://10.1.1.1:8/runner" ||
		p.Image.Digest != "sha256:"+imageSum || p.AgentSHA256["linux/amd64"] != agentSum {
		t.Errorf("pool %+v", p)
	}
	prepare, ok := vmprovider.As[vmprovider.ImagePreparer](p.Provider)
	if !ok {
		t.Fatal("the image of the pool cannot be prepared")
	}
	if err := prepare.PrepareImage(t.Context(), p.Image); err != nil {
		t.Fatal(err)
	}
	create := func(id string) vmprovider.Spec {
		t.Helper()
		if _, err := p.Provider.Create(t.Context(), vmprovider.Spec{ID: id, Owner: "me"}); err != nil {
			t.Fatal(err)
		}
		return plugin.last()
	}
	s := create("a")
	if data, err := os.ReadFile(s.Image.Path); err != nil || string(data) != "a disk" || s.Image.Format != "raw" || filepath.Dir(s.Image.Path) != filepath.Join(dir, "images") {
		t.Errorf("image %+v: %q, %v", s.Image, data, err)
	}
	if sums := s.Bootstrap.AgentSHA256; len(sums) != 1 || sums["linux/amd64"] != agentSum {
		t.Errorf("agents %v", sums)
	}
	// The agent is replaced, the image damaged.
	agentSum = put(t, filepath.Join(dir, "runner/agent-linux-amd64"), "a later agent")
	if err := errors.Join(os.Chmod(s.Image.Path, 0o644), os.WriteFile(s.Image.Path, []byte("damaged"), 0o644)); err != nil {
		t.Fatal(err)
	}
	s = create("b")
	if data, err := os.ReadFile(s.Image.Path); err != nil || string(data) != "a disk" || s.Bootstrap.AgentSHA256["linux/amd64"] != agentSum {
		t.Errorf("then %q, %v, agents %v", data, err, s.Bootstrap.AgentSHA256)
	}
	// In use, it stays in the store; what is not, and too much, went.
	if list, err := store.List(t.Context()); err != nil || len(list) != 1 {
		t.Errorf("the store has %+v, %v", list, err)
	}
	if err := store.Remove(t.Context(), f.pools[0].choice.Image); !errors.Is(err, image.ErrInUse) {
		t.Errorf("removing it: %v", err)
	}
	if _, err := plugin.Provider.Create(t.Context(), vmprovider.Spec{ID: "foreign", Owner: "another"}); err != nil {
		t.Fatal(err)
	}
	if err := set.DestroyAll(t.Context(), "me"); err != nil {
		t.Error(err)
	}
	var left []string
	for m, err := range plugin.List(t.Context(), vmprovider.ListOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, m.ID)
	}
	if strings.Join(left, " ") != "foreign" {
		t.Errorf("left: %q", left)
	}
	if err := plugin.Destroy(t.Context(), "foreign", vmprovider.DestroyOptions{}); err != nil {
		t.Error(err)
	}
	// Without an agent no machine is made that could only wait for one.
	if err := os.Remove(filepath.Join(dir, "runner/agent-linux-amd64")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Provider.Create(t.Context(), vmprovider.Spec{ID: "c", Owner: "me"}); !errors.Is(err, vmprovider.ErrInvalid) || !strings.Contains(err.Error(), "no agent for guests in "+dir) {
		t.Errorf("without an agent: %v", err)
	}
}

// TestRemoteImage: an image of the catalogue is not on another computer.
func TestRemoteImage(t *testing.T) {
	f, err := ReadFile(written(t, `
catalogue: images.yaml
pools:
  vms: { provider: libvirt, image: debian, libvirt: { uri: 'qemu+tcp://vms.example.com/system', accelerator: kvm, storage_pool: s, network: user } }
`), "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Open(t.Context(), Options{ImageDir: t.TempDir(), Logger: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "give image_file") {
		t.Errorf("opened: %v", err)
	}
}

// TestReach: guests are told addresses that they can reach, or the program does
// not start.
func TestReach(t *testing.T) {
	local := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 52}
	every := &net.TCPAddr{IP: net.IPv6unspecified, Port: 52}
	lan := &net.TCPAddr{IP: net.IPv4(192, 168, 1, 5), Port: 52}
	for name, c := range map[string]struct {
		gateway  string
		strict   bool
		agents   *net.TCPAddr
		contacts []string
		want     string // contact; empty: an error
	}{
		"loopback, user network":        {userNetHost, false, local, []string{"127.0.0.1:52"}, "10.0.2.2:52"},
		"everything, user network":      {userNetHost, false, every, []string{"ci.example.com:52"}, "10.0.2.2:52"},
		"one address, user network":     {userNetHost, false, lan, []string{"192.168.1.5:52"}, ""}, // nothing of the pool's: the engine's own contacts
		"loopback, another network":     {"", false, local, []string{"127.0.0.1:52", "localhost:52"}, "error"},
		"other contacts, other network": {"", false, local, []string{"192.168.1.5:52"}, ""},
		"loopback, isolated":            {"10.99.0.1", true, local, []string{"127.0.0.1:52"}, "error"},
		"everything, isolated":          {"10.99.0.1", true, every, []string{"ci.example.com:52"}, "10.99.0.1:52"},
	} {
		p := &opened{entry: &entry{name: "vms", Provider: "libvirt"}, provider: &machines{Provider: memvm.New(memvm.Config{})}, gateway: c.gateway, on: net.IP.IsLoopback}
		advice := []string{"contacts:", "runner_url:"}
		if c.strict {
			p.Libvirt, p.on = &libvirt{Isolation: "strict"}, net.ParseIP(c.gateway).Equal
			advice = []string{"--agent-addr 10.99.0.1:52", "--runner-addr 10.99.0.1:52"}
		}
		pools, err := (&Set{opened: []*opened{p}}).Pools(Endpoints{Agents: c.agents, Runner: c.agents, Contacts: c.contacts, RunnerURL: "http://" + c.contacts[0] + "/runner"})
		switch {
		case c.want == "error":
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), advice[0]) || !strings.Contains(err.Error(), advice[1]) {
				t.Errorf("%s: error %v", name, err)
			}
		case err != nil:
			t.Errorf("%s: %v", name, err)
		case c.want == "" && len(pools[0].Contacts) > 0, c.want != "" && pools[0].Contacts[0] != c.want,
			c.want != "" && pools[0].RunnerURL != "http://"+c.want+"/runner":
			t.Errorf("%s: contacts %q, runner %q", name, pools[0].Contacts, pools[0].RunnerURL)
		}
		_ = p.provider.Close()
	}
}

// TestIsolatedNeedsPorts: a program that cannot say which ports guests come to has
// no isolated pools, and no network is made for them.
func TestIsolatedNeedsPorts(t *testing.T) {
	f, err := ReadFile(written(t, "pools: { vms: { provider: libvirt, image_file: /x, image_format: raw, libvirt: { uri: 'qemu:///system', accelerator: tcg, storage_pool: s, isolation: strict, bridge: sol0, subnet: 10.99.0.0/24 } } }"), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Open(t.Context(), Options{}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "pool vms") || !strings.Contains(err.Error(), "fixed ports") {
		t.Errorf("error %v", err)
	}
}
