package libvirtvm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/seed"
)

func TestConfigInvalid(t *testing.T) {
	for want, change := range map[string]func(c *Config){
		`URI ""`:                       func(c *Config) { c.URI = "" },
		`URI "system"`:                 func(c *Config) { c.URI = "system" },
		`accelerator ""`:               func(c *Config) { c.Accelerator = "" },
		`accelerator "qemu"`:           func(c *Config) { c.Accelerator = "qemu" },
		`storage pool ""`:              func(c *Config) { c.StoragePool = "" },
		`network type ""`:              func(c *Config) { c.Network = Network{} },
		`network of type bridge: name`: func(c *Config) { c.Network = Network{Type: NetworkBridge} },
		`network of type user has no name, got "br0"`: func(c *Config) { c.Network.Name = "br0" },
		`not negative`:                           func(c *Config) { c.CPUQuota = 2 },
		`"qemu:///session": only a system's`:     func(c *Config) { c.URI, c.CPUQuota = "qemu:///session", 0.5 },
		`domain: XML syntax error`:               func(c *Config) { c.Domain = "<cpu>" },
		`libvirt has no element /cpus`:           func(c *Config) { c.Domain = "<cpus/>" },
		`libvirt has no element /devices/sounds`: func(c *Config) { c.Domain = "<devices><sounds/></devices>" },
	} {
		c := fakeConfig()
		change(&c)
		_, err := open(t.Context(), c, newFakeHost().dial)
		if !errors.Is(err, vmprovider.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q: %v", want, err)
		}
	}
	c := fakeConfig()
	c.StoragePool = "other"
	if _, err := open(t.Context(), c, newFakeHost().dial); !errors.Is(err, vmprovider.ErrUnavailable) || !strings.Contains(err.Error(), `storage pool "other"`) {
		t.Errorf("a pool that is not there: %v", err)
	}
}

// xmlOf is the XML of a machine's domain.
func xmlOf(t *testing.T, c Config, s vmprovider.Spec) string {
	t.Helper()
	c, err := c.complete()
	if err != nil {
		t.Fatal(err)
	}
	text, err := c.domain(blueprint{spec: s, meta: metadata{ID: s.ID, Owner: s.Owner}, poolPath: "/pool"})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestDomainXML(t *testing.T) {
	c := fakeConfig()
	c.Accelerator, c.Network = KVM, Network{NetworkBridge, "br0"}
	c.CPUQuota, c.DiskIOPS, c.DiskBytesPerSecond, c.SeedFormat = 0.5, 100, 1<<20, seed.ISO
	c.Domain = `<cpu mode="host-model"/><name>other</name><devices><watchdog model="itco" action="poweroff"/></devices>`
	s := fakeSpec("t-1", `/images/a"<b>.qcow2`)
	s.CPUs, s.MemoryBytes, s.Owner = 2, 512<<20, "me & you"
	got := xmlOf(t, c, s)
	for _, want := range []string{
		`<domain type="kvm">`, `<name>t-1</name>`, `>524288</memory>`, `>2</vcpu>`, `<quota>50000</quota>`, `<cpu mode="host-model">`,
		`machine="q35"`, `<source bridge="br0"`, `<total_bytes_sec>1048576</total_bytes_sec>`, `<total_iops_sec>100</total_iops_sec>`,
		`file="/images/a&#34;&lt;b&gt;.qcow2"`, `file="/pool/t-1@me+%26+you@disk.qcow2"`, `device="cdrom"`, `<watchdog model="itco" action="poweroff">`,
		`<on_reboot>destroy</on_reboot>`, `<owner>me &amp; you</owner>`, `<backingStore></backingStore>`, `error_policy="report"`, `append="on"`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
	if strings.Contains(got, "secret-token") || strings.Contains(got, "other") {
		t.Errorf("it has what it should not:\n%s", got)
	}
	m, err := read(got)
	if err != nil || m.ID != "t-1" || m.Owner != "me & you" {
		t.Errorf("read back: %+v, %v", m, err)
	}
}

func TestVolumeNames(t *testing.T) {
	for _, owner := range []string{"", "me", "a@b", "a/b", "../x", "ü%", "sp ace"} {
		name := volume("t-1", owner, seedVolume)
		if strings.ContainsAny(name, "/ ") {
			t.Errorf("%q is no name of a file", name)
		}
		if id, got, ok := volumeOf(name); !ok || id != "t-1" || got != owner {
			t.Errorf("%q: %q, %q, %t", name, id, got, ok)
		}
	}
	if id, owner, ok := volumeOf(volume("t-1", "me", consoleVolume) + ".2"); !ok || id != "t-1" || owner != "me" {
		t.Errorf("what virtlogd put aside: %q of %q, %t", id, owner, ok)
	}
	for _, name := range []string{"base.qcow2", "a@b", "A@b@seed", "t-1@%zz@seed", "@@"} {
		if id, owner, ok := volumeOf(name); ok {
			t.Errorf("%q is taken for a part of %q of %q", name, id, owner)
		}
	}
}

func TestImage(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, content []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	header := func(change func(h []byte)) []byte {
		h := make([]byte, 104)
		copy(h, "QFI\xfb\x00\x00\x00\x03")
		h[27] = 0x10 // 1 MiB, in 24 to 31
		h[28], h[29] = 0, 0
		h[27], h[29] = 0, 0x10
		if change != nil {
			change(h)
		}
		return h
	}
	c := fakeConfig()
	c.URI = "qemu:///system"
	for _, x := range []struct {
		file, format string
		disk         int64
		want         string
	}{
		{write("good", header(nil)), "qcow2", 1 << 20, ""},
		{write("raw", make([]byte, 4096)), "raw", 0, ""},
		{filepath.Join(dir, "good"), "qcow2", 1<<20 - 1, "smaller than its image"},
		{filepath.Join(dir, "raw"), "raw", 4095, "smaller than its image"},
		{filepath.Join(dir, "raw"), "qcow2", 0, "no qcow2 image"},
		{filepath.Join(dir, "raw"), "", 0, `format ""`},
		{"", "raw", 0, `image ""`},
		{filepath.Join(dir, "absent"), "raw", 0, "is not there"},
		{write("backed", header(func(h []byte) { h[15] = 0x68 })), "qcow2", 0, "backing file"},
		{write("external", header(func(h []byte) { h[79] = 4 })), "qcow2", 0, "in another file"},
		{write("short", header(nil)[:74]), "qcow2", 0, "cut off"},
	} {
		s := vmprovider.Spec{Image: vmprovider.Image{Path: x.file, Format: x.format}, DiskBytes: x.disk}
		err := c.checkImage(s)
		if (x.want == "") != (err == nil) || err != nil && (!errors.Is(err, vmprovider.ErrInvalid) || !strings.Contains(err.Error(), x.want)) {
			t.Errorf("%s as %q with %d bytes: %v; want %q", filepath.Base(x.file), x.format, x.disk, err, x.want)
		}
	}
}
