package libvirtvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"libvirt.org/go/libvirtxml"

	"github.com/solstice-ci/solstice-go/internal/selfca"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/vmprovidertest"
)

var testCA = sync.OnceValue(func() []byte {
	ca, err := selfca.New("agents.test")
	if err != nil {
		panic(err)
	}
	return ca.PEM()
})

func bootstrap() vmprovider.Bootstrap {
	return vmprovider.Bootstrap{
		Contacts: []string{"10.0.2.2:50052"}, CA: testCA(),
		Token: "secret-token", RunnerURL: "http://10.0.2.2:8080/runner",
		AgentSHA256: map[string]string{"linux/amd64": strings.Repeat("0", 64)}, Hostname: "sol-1", InstanceID: "sol-1",
	}
}

// fakeHost is a host without guests, for the faults and the machines that have no
// hypervisor. What an image is called says what its guest does.
type fakeHost struct {
	mu      sync.Mutex
	domains map[string]*fakeDomain
	volumes map[string][]byte
	files   map[string][]byte // that libvirt has not heard of
	conns   []*fakeConn
	most    int // bytes of one download
	// networks are UUIDs by name; rules are the bridges that have some.
	networks, rules map[string]string
	// before, when set, is called at the beginning of each call, by its name; its
	// error fails the call.
	before func(call string) error
}

type fakeDomain struct {
	xml    libvirtxml.Domain
	active bool
	reason string
}

const fakePool = "fake"

func newFakeHost() *fakeHost {
	return &fakeHost{domains: map[string]*fakeDomain{}, volumes: map[string][]byte{}, files: map[string][]byte{}, networks: map[string]string{}, rules: map[string]string{}}
}

func (h *fakeHost) dial(string) (hypervisor, error) {
	c := &fakeConn{host: h, lost: make(chan struct{})}
	if err := c.enter("dial"); err != nil {
		return nil, fmt.Errorf("%w: %w", errLost, err)
	}
	h.conns = append(h.conns, c)
	h.mu.Unlock()
	return c, nil
}

// intercept sets before.
func (h *fakeHost) intercept(before func(call string) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.before = before
}

// left counts what there is.
func (h *fakeHost) left() (domains, volumes int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.domains), len(h.volumes) + len(h.files)
}

// empty asserts that there is nothing.
func (h *fakeHost) empty(t *testing.T) {
	t.Helper()
	if d, v := h.left(); d+v > 0 {
		t.Errorf("left: %d domains, %d volumes", d, v)
	}
}

// drop cuts all connections.
func (h *fakeHost) drop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.conns {
		close(c.lost)
	}
	h.conns = nil
}

// changed tells every connection, with the host locked.
func (h *fakeHost) changed(name string) {
	for _, c := range h.conns {
		if c.f != nil {
			go c.f(name)
		}
	}
}

type fakeConn struct {
	host *fakeHost
	lost chan struct{}
	f    func(string)
}

// enter locks the host, unless the call fails.
func (c *fakeConn) enter(call string) error {
	c.host.mu.Lock()
	before := c.host.before
	c.host.mu.Unlock()
	if before != nil {
		if err := before(call); err != nil {
			return err
		}
	}
	c.host.mu.Lock()
	select {
	case <-c.lost:
		c.host.mu.Unlock()
		return errLost
	default:
		return nil
	}
}

func (c *fakeConn) Hostname() (string, error) { return "fake", nil }

func (c *fakeConn) DefineDomain(xml string) error {
	if err := c.enter("define"); err != nil {
		return err
	}
	defer c.host.mu.Unlock()
	d := &fakeDomain{}
	if err := d.xml.Unmarshal(xml); err != nil {
		return err
	}
	if c.host.domains[d.xml.Name] != nil {
		return errExists
	}
	c.host.domains[d.xml.Name] = d
	return nil
}

// on calls f on a domain, with the host locked.
func (c *fakeConn) on(call, name string, f func(d *fakeDomain) error) error {
	if err := c.enter(call); err != nil {
		return err
	}
	defer c.host.mu.Unlock()
	d := c.host.domains[name]
	if d == nil {
		return errNoDomain
	}
	return f(d)
}

func (c *fakeConn) StartDomain(name string) error {
	return c.on("start", name, func(d *fakeDomain) error {
		for _, disk := range d.xml.Devices.Disks {
			file := disk.Source.File.File
			if _, ok := c.host.volumes[file[strings.LastIndex(file, "/")+1:]]; !ok {
				return errors.New("there is no " + file)
			}
		}
		console := d.xml.Devices.Serials[0].Source.File.Path
		console = console[strings.LastIndex(console, "/")+1:]
		image, _ := url.Parse(d.xml.Devices.Disks[0].BackingStore.Source.File.File)
		switch image.Path {
		case "/prints":
			c.host.volumes[console] = []byte(image.Query().Get("text"))
		case "/exits":
			go c.host.end(name)
		}
		d.active = true
		c.host.changed(name)
		return nil
	})
}

// end is a guest that powers off.
func (h *fakeHost) end(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d := h.domains[name]; d != nil {
		d.active, d.reason = false, "the guest powered off"
		h.changed(name)
	}
}

func (c *fakeConn) StopDomain(name string) error {
	return c.on("stop", name, func(d *fakeDomain) error {
		if !d.active {
			return errNotRunning
		}
		d.active, d.reason = false, "it was stopped"
		c.host.changed(name)
		return nil
	})
}

func (c *fakeConn) UndefineDomain(name string) error {
	return c.on("undefine", name, func(*fakeDomain) error {
		delete(c.host.domains, name)
		c.host.changed(name)
		return nil
	})
}

func (c *fakeConn) SetMetadata(name, _, xml string) error {
	return c.on("metadata", name, func(d *fakeDomain) error {
		d.xml.Metadata.XML = xml
		return nil
	})
}

func (d *fakeDomain) snapshot() (domain, error) {
	text, err := d.xml.Marshal()
	return domain{XML: text, Active: d.active, Reason: d.reason}, err
}

func (c *fakeConn) Domain(name string) (found domain, err error) {
	err = c.on("domain", name, func(d *fakeDomain) error {
		found, err = d.snapshot()
		return err
	})
	return found, err
}

func (c *fakeConn) Domains() ([]domain, error) {
	if err := c.enter("domains"); err != nil {
		return nil, err
	}
	defer c.host.mu.Unlock()
	var all []domain
	for _, d := range c.host.domains {
		s, err := d.snapshot()
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
}

func (c *fakeConn) PoolXML(pool string) (string, error) {
	if pool != fakePool {
		return "", errNoPool
	}
	return `<pool type="dir"><name>fake</name><target><path>/fake</path></target></pool>`, nil
}

func (c *fakeConn) RefreshPool(string) error {
	err := c.enter("refresh")
	if err == nil {
		maps.Copy(c.host.volumes, c.host.files)
		clear(c.host.files)
		c.host.mu.Unlock()
	}
	return err
}

func (c *fakeConn) CreateVolume(_, xml string) error {
	var v libvirtxml.StorageVolume
	if err := v.Unmarshal(xml); err != nil {
		return err
	}
	if err := c.enter("create " + v.Name[strings.LastIndex(v.Name, "@")+1:]); err != nil {
		return err
	}
	defer c.host.mu.Unlock()
	if _, there := c.host.volumes[v.Name]; there {
		return errExists
	}
	c.host.volumes[v.Name] = nil
	return nil
}

// volume calls f on a volume's content, with the host locked.
func (c *fakeConn) volume(call, name string, f func(content []byte)) error {
	if err := c.enter(call); err != nil {
		return err
	}
	defer c.host.mu.Unlock()
	content, there := c.host.volumes[name]
	if !there {
		return errNoVolume
	}
	f(content)
	return nil
}

func (c *fakeConn) Upload(_, volume string, content []byte) error {
	return c.volume("upload", volume, func([]byte) { c.host.volumes[volume] = slices.Clone(content) })
}

func (c *fakeConn) Download(_, volume string, offset, length int64, w io.Writer) error {
	return c.volume("download", volume, func(content []byte) {
		content = content[min(int64(len(content)), offset):]
		n, _ := w.Write(content[:min(int64(len(content)), length)])
		c.host.most = max(c.host.most, n)
	})
}

func (c *fakeConn) DeleteVolume(_, volume string) error {
	return c.volume("delete", volume, func([]byte) { delete(c.host.volumes, volume) })
}

func (c *fakeConn) Volumes(string) ([]string, error) {
	if err := c.enter("volumes"); err != nil {
		return nil, err
	}
	defer c.host.mu.Unlock()
	return slices.Collect(maps.Keys(c.host.volumes)), nil
}

func (c *fakeConn) Network(name string) (string, error) {
	if err := c.enter("network"); err != nil {
		return "", err
	}
	defer c.host.mu.Unlock()
	id, ok := c.host.networks[name]
	if !ok {
		return "", errNoNetwork
	}
	return id, nil
}

func (c *fakeConn) StartNetwork(xml string) error {
	if err := c.enter("start network"); err != nil {
		return err
	}
	defer c.host.mu.Unlock()
	var n libvirtxml.Network
	if err := n.Unmarshal(xml); err != nil {
		return err
	}
	if c.host.networks[n.Name] != "" {
		return errExists
	}
	if c.host.rules[n.Bridge.Name] == "" {
		return errors.New("the bridge comes up without rules")
	}
	c.host.networks[n.Name] = n.UUID
	return nil
}

func (c *fakeConn) StopNetwork(name string) error {
	if err := c.enter("stop network"); err != nil {
		return err
	}
	defer c.host.mu.Unlock()
	delete(c.host.networks, name)
	return nil
}

// fakeFirewall is the host's.
type fakeFirewall struct{ *fakeHost }

func (h fakeFirewall) apply(i *Isolation) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.rules[i.Bridge] = fmt.Sprint(i.Allow)
	return nil
}

func (h fakeFirewall) intact(i *Isolation) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.rules[i.Bridge] != ""
}

func (h fakeFirewall) remove(bridge string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.networks[bridge] != "" {
		return errors.New("the bridge is there without rules")
	}
	delete(h.rules, bridge)
	return nil
}

func (h fakeFirewall) addresses(name string) ([]netip.Addr, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return []netip.Addr{netip.MustParseAddr("10.99.0.1")}, h.networks[name] != ""
}

func (c *fakeConn) Changes(f func(string)) error {
	if err := c.enter("changes"); err != nil {
		return err
	}
	defer c.host.mu.Unlock()
	var one sync.Mutex
	c.f = func(name string) {
		one.Lock()
		defer one.Unlock()
		f(name)
	}
	return nil
}

func (c *fakeConn) Lost() <-chan struct{} { return c.lost }

func (c *fakeConn) Close() {
	c.host.mu.Lock()
	defer c.host.mu.Unlock()
	c.host.conns = slices.DeleteFunc(c.host.conns, func(o *fakeConn) bool { return o == c })
}

func fakeConfig() Config {
	// Remote, so that no image is looked for here.
	return Config{URI: "qemu+ssh://fake/system", Accelerator: TCG, StoragePool: fakePool, Network: Network{Type: NetworkUser}}
}

func (h *fakeHost) provider(t vmprovidertest.T, cfg Config) *Provider {
	p, err := open(context.WithoutCancel(t.Context()), cfg, h.dial)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return p
}

func fakeSpec(id, image string) vmprovider.Spec {
	return vmprovider.Spec{ID: id, Owner: "me", Image: vmprovider.Image{Path: image, Format: "qcow2"}, Bootstrap: bootstrap()}
}

// TestFakeConformance: the driver keeps its promises where the hypervisor does.
func TestFakeConformance(t *testing.T) {
	h := newFakeHost()
	with := func(image string) func(vmprovidertest.T, *vmprovider.Spec) {
		return func(_ vmprovidertest.T, s *vmprovider.Spec) {
			s.Image, s.Bootstrap = vmprovider.Image{Path: image, Format: "qcow2"}, bootstrap()
		}
	}
	cfg := fakeConfig()
	cfg.Max = 12
	vmprovidertest.Run(t, vmprovidertest.Harness{
		Open:       func(t vmprovidertest.T) vmprovider.Provider { return h.provider(t, cfg) },
		Spec:       with("/runs"),
		NeverBoots: with("/runs"),
		ExitsEarly: with("/exits"),
		Panics:     with("/exits"),
		Prints: func(t vmprovidertest.T, s *vmprovider.Spec, text string) {
			with("/prints?"+url.Values{"text": {text}}.Encode())(t, s)
		},
		Leave: func(_ vmprovidertest.T, id, owner string) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.volumes[volume(id, owner, seedVolume)] = nil
		},
		Capacity: cfg.Max,
	})
	h.empty(t)
	if n := len(h.conns); n > 0 {
		t.Errorf("%d connections are left", n)
	}
}

// TestCreateFails: a step that fails leaves nothing, and the error says which.
func TestCreateFails(t *testing.T) {
	for call, want := range map[string]error{
		"define": nil, "create disk.qcow2": vmprovider.ErrCapacity, "create seed": nil, "upload": nil, "create console": nil, "start": nil, "metadata": nil,
	} {
		t.Run(call, func(t *testing.T) {
			h := newFakeHost()
			p := h.provider(t, fakeConfig())
			defer func() { _ = p.Close() }()
			broken := errors.New("broken")
			if errors.Is(want, vmprovider.ErrCapacity) {
				broken = errNoSpace
			}
			h.intercept(func(c string) error {
				if c == call {
					return broken
				}
				return nil
			})
			_, err := p.Create(t.Context(), fakeSpec("t-1", "/runs"))
			if !errors.Is(err, broken) || want != nil && !errors.Is(err, want) {
				t.Errorf("Create: %v", err)
			}
			h.empty(t)
		})
	}
}

// TestDestroyGoesOn: a step that fails does not keep the others from being done,
// and a repeat does the rest.
func TestDestroyGoesOn(t *testing.T) {
	for _, call := range []string{"stop", "delete", "undefine"} {
		t.Run(call, func(t *testing.T) {
			h := newFakeHost()
			p := h.provider(t, fakeConfig())
			defer func() { _ = p.Close() }()
			if _, err := p.Create(t.Context(), fakeSpec("t-1", "/runs")); err != nil {
				t.Fatal(err)
			}
			var failed atomic.Bool
			h.intercept(func(c string) error {
				if c == call && failed.CompareAndSwap(false, true) {
					return errors.New("broken")
				}
				return nil
			})
			if err := p.Destroy(t.Context(), "t-1", vmprovider.DestroyOptions{}); err == nil {
				t.Error("Destroy said nothing of the failure")
			}
			if d, v := h.left(); v != map[string]int{"delete": 1}[call] || d != 1 {
				t.Errorf("left: %d domains, %d volumes", d, v)
			}
			if err := p.Destroy(t.Context(), "t-1", vmprovider.DestroyOptions{}); err != nil {
				t.Errorf("again: %v", err)
			}
			h.empty(t)
		})
	}
}

// TestDestroyUnderReader: a volume that somebody is opening is deleted when that is done.
func TestDestroyUnderReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHost()
		p := h.provider(t, fakeConfig())
		defer func() { _ = p.Close() }()
		if _, err := p.Create(t.Context(), fakeSpec("t-1", "/runs")); err != nil {
			t.Fatal(err)
		}
		var tries atomic.Int64
		h.intercept(func(c string) error {
			if (c == "delete" || c == "refresh") && tries.Add(1)%3 > 0 {
				return errBusy
			}
			return nil
		})
		if err := p.Destroy(t.Context(), "t-1", vmprovider.DestroyOptions{}); err != nil {
			t.Error(err)
		}
		h.empty(t)
	})
}

// TestConsoleRotated: virtlogd has put a console's file aside, and begun another. It
// is followed all the same, and Destroy finds all of them.
func TestConsoleRotated(t *testing.T) {
	for name, next := range map[string]string{"shorter": "new\n", "longer": strings.Repeat("new\n", 1000)} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFakeHost()
				p := h.provider(t, fakeConfig())
				defer func() { _ = p.Close() }()
				old := strings.Repeat("old\n", 100)
				if _, err := p.Create(t.Context(), fakeSpec("t-1", "/prints?"+url.Values{"text": {old}}.Encode())); err != nil {
					t.Fatal(err)
				}
				r, err := consoler{p}.Console(t.Context(), "t-1", true)
				if err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(old)+len(next))
				if _, err := io.ReadFull(r, got[:len(old)]); err != nil {
					t.Fatal(err)
				}
				h.mu.Lock()
				file := volume("t-1", "me", consoleVolume)
				h.files[file+".0"], h.volumes[file] = h.volumes[file], []byte(next)
				h.mu.Unlock()
				if _, err := io.ReadFull(r, got[len(old):]); err != nil || string(got) != old+next {
					t.Errorf("%q, %v", got, err)
				}
				if err := p.Destroy(t.Context(), "t-1", vmprovider.DestroyOptions{}); err != nil {
					t.Error(err)
				}
				h.empty(t)
				if rest, err := io.ReadAll(r); err != nil || len(rest) > 0 {
					t.Errorf("at last %q, %v", rest, err)
				}
			})
		})
	}
}

// TestConsolePieces: much that a guest has printed is not in memory at once, and is
// read without pauses.
func TestConsolePieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHost()
		p := h.provider(t, fakeConfig())
		defer func() { _ = p.Close() }()
		text := strings.Repeat("0123456789abcde\n", 8*piece/16)
		if _, err := p.Create(t.Context(), fakeSpec("t-1", "/prints?"+url.Values{"text": {text}}.Encode())); err != nil {
			t.Fatal(err)
		}
		for _, follow := range []bool{false, true} {
			began := time.Now()
			r, err := consoler{p}.Console(t.Context(), "t-1", follow)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(text))
			if _, err := io.ReadFull(r, got); err != nil || string(got) != text || time.Since(began) > 0 {
				t.Errorf("it is another text, %v, after %s", err, time.Since(began))
			}
			if follow {
				continue
			}
			if rest, err := io.ReadAll(r); err != nil || len(rest) > 0 {
				t.Errorf("at last %q, %v", rest, err)
			}
		}
		if h.most > piece {
			t.Errorf("%d bytes at once", h.most)
		}
	})
}

// TestConnectionLost: in the middle of a Create what is left is removed over the
// next connection.
func TestConnectionLost(t *testing.T) {
	h := newFakeHost()
	p := h.provider(t, fakeConfig())
	defer func() { _ = p.Close() }()
	h.intercept(func(c string) error {
		if c == "upload" {
			h.drop()
		}
		return nil
	})
	if _, err := p.Create(t.Context(), fakeSpec("t-1", "/runs")); !errors.Is(err, vmprovider.ErrUnavailable) {
		t.Errorf("Create: %v", err)
	}
	h.empty(t)
}

// TestCallsHonourTheirContext: a libvirtd that does not answer holds nobody up.
func TestCallsHonourTheirContext(t *testing.T) {
	h := newFakeHost()
	p := h.provider(t, fakeConfig())
	defer func() { _ = p.Close() }()
	stuck, release := make(chan struct{}, 10), make(chan struct{})
	h.intercept(func(string) error {
		stuck <- struct{}{}
		<-release
		return nil
	})
	defer close(release)
	for name, f := range map[string]func(ctx context.Context) error{
		"Get": func(ctx context.Context) error { _, err := p.Get(ctx, "t-1"); return err },
		"List": func(ctx context.Context) (last error) {
			for _, last = range p.List(ctx, vmprovider.ListOptions{}) {
				continue
			}
			return last
		},
		"Destroy": func(ctx context.Context) error { return p.Destroy(ctx, "t-1", vmprovider.DestroyOptions{}) },
	} {
		ctx, cancel := context.WithCancel(t.Context())
		go func() { <-stuck; cancel() }()
		if err := f(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
