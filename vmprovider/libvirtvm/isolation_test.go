package libvirtvm

import (
	"errors"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

func TestAllowedText(t *testing.T) {
	for _, text := range []string{"tcp/10.0.0.5:5432", "udp/192.0.2.0/24:53", "tcp/0.0.0.0/0:443", "tcp/[2001:db8::]/32:443", "udp/[2001:db8::1]:65535"} {
		var a Allowed
		if err := yaml.Unmarshal([]byte(text), &a); err != nil || a.String() != text {
			t.Errorf("%s: %s, %v", text, a, err)
		}
	}
	for text, want := range map[string]string{
		"": "there is no port", "tcp": "there is no port", "10.0.0.5:80": "there is no port", "icmp/10.0.0.5:80": `protocol "icmp"`, "TCP/10.0.0.5:80": `protocol "TCP"`,
		"tcp/10.0.0.5": "no port", "tcp/10.0.0.5:": `port ""`, "tcp/10.0.0.5:http": `port "http"`, "tcp/10.0.0.5:0": "port 0", "tcp/10.0.0.5:65536": `port "65536"`,
		"tcp/10.0.0.5:080": `port "080"`, "tcp/10.0.0.5:+80": `port "+80"`, "tcp/10.0.0.5:80 ": `port "80 "`, "tcp/ 10.0.0.5:80": `" 10.0.0.5" is not an address`,
		"tcp/10.0.0.5/24:80": "10.0.0.5 is not the beginning of its net 10.0.0.0/24", "tcp/10.0.0.0/33:80": `"/33"`, "tcp/10.0.0.0/:80": `"/"`, "tcp/host:80": `"host" is not an address`,
		"tcp/2001:db8::1:80": "brackets", "tcp/[10.0.0.5]:80": "brackets", "tcp/[2001:db8::1:80": "not closed", "tcp/[2001:db8::1]": "no port", "tcp/[2001:db8::1]x:80": `"x"`,
		"tcp/[fe80::1%eth0]:80": "zone", "tcp/[::ffff:10.0.0.5]:80": "IPv4 written as such",
	} {
		var a Allowed
		if err := a.UnmarshalText([]byte(text)); err == nil || !strings.Contains(err.Error(), want) || a != (Allowed{}) {
			t.Errorf("%q: %+v, %v; want %q", text, a, err, want)
		}
	}
}

func FuzzAllowed(f *testing.F) {
	f.Add("tcp/10.0.0.5:5432")
	f.Add("tcp/[2001:db8::]/32:443")
	f.Fuzz(func(t *testing.T, text string) {
		a, err := parseAllowed(text)
		if err != nil {
			return
		}
		if b, err := parseAllowed(a.String()); err != nil || a != b {
			t.Errorf("%q: %+v, again %+v, %v", text, a, b, err)
		}
	})
}

func allowed(t *testing.T, texts ...string) (all []Allowed) {
	t.Helper()
	for _, text := range texts {
		var a Allowed
		if err := a.UnmarshalText([]byte(text)); err != nil {
			t.Fatal(err)
		}
		all = append(all, a)
	}
	return all
}

// isolated is a fake's configuration.
func isolated(t *testing.T, h *fakeHost) Config {
	c := fakeConfig()
	c.URI, c.Network, c.firewall = "qemu:///system", Network{}, fakeFirewall{h}
	c.Isolation = &Isolation{Bridge: "sol0", Subnet: netip.MustParsePrefix("10.99.0.0/29"), Allow: allowed(t, "tcp/10.99.0.1:50052", "udp/10.0.0.53:53")}
	return c
}

func TestIsolationInvalid(t *testing.T) {
	for want, change := range map[string]func(c *Config){
		"qemu:///system: the bridge":  func(c *Config) { c.URI = "qemu:///session" },
		`"qemu+ssh://host/system"`:    func(c *Config) { c.URI = "qemu+ssh://host/system" },
		`"test:///default"`:           func(c *Config) { c.URI = "test:///default" },
		"leave network out":           func(c *Config) { c.Network = Network{Type: NetworkUser} },
		`bridge ""`:                   func(c *Config) { c.Isolation.Bridge = "" },
		`bridge "a23456789012345x"`:   func(c *Config) { c.Isolation.Bridge = "a23456789012345x" },
		"subnet invalid Prefix":       func(c *Config) { c.Isolation.Subnet = netip.Prefix{} },
		"subnet 10.0.0.1/24":          func(c *Config) { c.Isolation.Subnet = netip.MustParsePrefix("10.0.0.1/24") },
		"subnet 10.0.0.0/8":           func(c *Config) { c.Isolation.Subnet = netip.MustParsePrefix("10.0.0.0/8") },
		"subnet fd00::/24":            func(c *Config) { c.Isolation.Subnet = netip.MustParsePrefix("fd00::/24") },
		"IPv4 only":                   func(c *Config) { c.Isolation.Allow = allowed(t, "tcp/[2001:db8::1]:80") },
		"no machine reaches":          func(c *Config) { c.Isolation.Allow = allowed(t, "tcp/127.0.0.1:80") },
		"where 10.99.0.1 is the host": func(c *Config) { c.Isolation.Allow = allowed(t, "tcp/10.99.0.2:80") },
		"neither tcp nor udp":         func(c *Config) { c.Isolation.Allow = []Allowed{{}} },
		"no other interface": func(c *Config) {
			c.Domain = `<devices><interface type="user"/></devices>`
		},
	} {
		h := newFakeHost()
		c := isolated(t, h)
		change(&c)
		_, err := open(t.Context(), c, h.dial)
		if !errors.Is(err, vmprovider.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q: %v", want, err)
		}
	}
}

// TestIsolation: the network is there as long as it is needed, with rules before
// and after, and every machine has a place of its own in it.
func TestIsolation(t *testing.T) {
	h := newFakeHost()
	cfg := isolated(t, h)
	dir := t.TempDir()
	spec := func(id string) vmprovider.Spec {
		s := fakeSpec(id, dir+"/image")
		s.Image.Format = "raw"
		return s
	}
	if err := os.WriteFile(dir+"/image", make([]byte, 512), 0o600); err != nil {
		t.Fatal(err)
	}
	p := h.provider(t, cfg)
	for _, id := range []string{"a", "b", "c", "d", "e"} {
		if _, err := p.Create(t.Context(), spec(id)); err != nil {
			t.Fatal(err)
		}
	}
	places := map[string]bool{}
	for _, d := range h.domains {
		for _, nic := range d.xml.Devices.Interfaces {
			if nic.PortOptions.Isolated != "yes" || nic.Source.Network.Network != "sol0" {
				t.Errorf("interface %+v", nic)
			}
			places[nic.MAC.Address+" "+nic.Target.Dev] = true
		}
	}
	if len(places) != 5 || !places["52:54:0a:63:00:02 sol0a630002"] {
		t.Errorf("places: %v", slices.Sorted(maps.Keys(places)))
	}
	if _, err := p.Create(t.Context(), spec("f")); !errors.Is(err, vmprovider.ErrCapacity) {
		t.Errorf("a sixth: %v", err)
	}
	// Somebody flushes the rules and stops the network.
	clear(h.rules)
	clear(h.networks)
	if err := p.Destroy(t.Context(), "e", vmprovider.DestroyOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Create(t.Context(), spec("e")); err != nil || h.rules["sol0"] == "" || h.networks["sol0"] == "" {
		t.Errorf("not restored: %v, %v, %v", err, h.rules, h.networks)
	}
	if err := p.Close(); err != nil || len(h.networks) != 1 || len(h.rules) != 1 {
		t.Errorf("closed under the machines: %v, %v, %v", err, h.rules, h.networks)
	}
	other := cfg
	other.Isolation = &Isolation{Bridge: "sol0", Subnet: netip.MustParsePrefix("10.98.0.0/29")}
	if _, err := open(t.Context(), other, h.dial); !errors.Is(err, vmprovider.ErrInvalid) || !strings.Contains(err.Error(), "5 machines are in it") {
		t.Errorf("another subnet: %v", err)
	}
	before := h.networks["sol0"]
	cfg.Isolation.Allow = cfg.Isolation.Allow[:1] // and no name server
	p = h.provider(t, isolated(t, h))
	for _, id := range []string{"a", "b", "c", "d", "e"} {
		if err := p.Destroy(t.Context(), id, vmprovider.DestroyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	p2 := h.provider(t, cfg)
	if h.networks["sol0"] == before || h.rules["sol0"] != "[tcp/10.99.0.1:50052]" {
		t.Errorf("not replaced: %v, %v", h.rules, h.networks)
	}
	if err := errors.Join(p.Close(), p2.Close()); err != nil || len(h.networks)+len(h.rules) > 0 {
		t.Errorf("left: %v, %v, %v", err, h.rules, h.networks)
	}
}

// TestGuard: rules that were flushed come back by themselves.
func TestGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHost()
		p := h.provider(t, isolated(t, h))
		h.mu.Lock()
		clear(h.rules)
		h.mu.Unlock()
		time.Sleep(guardEvery + 1)
		synctest.Wait()
		if h.rules["sol0"] == "" {
			t.Error("there are no rules")
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestIsolationForeign: a network of others is refused, and stays as it was.
func TestIsolationForeign(t *testing.T) {
	h := newFakeHost()
	h.networks["sol0"] = "d0e9964a-f95d-4c94-b749-b609aed52e35"
	_, err := open(t.Context(), isolated(t, h), h.dial)
	if !errors.Is(err, vmprovider.ErrInvalid) || !strings.Contains(err.Error(), "not Solstice's") || len(h.networks) != 1 || len(h.rules) != 0 {
		t.Errorf("%v, %v, %v", err, h.networks, h.rules)
	}
}
