package pools

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/daemon/internal/operator"
	"github.com/solstice-ci/solstice-go/vmprovider/image"
	"github.com/solstice-ci/solstice-go/vmprovider/libvirtvm"
)

const catalogue = `
default_label: debian-12
aliases: { debian: debian-12 }
sizes:
  small: { cpus: 1, memory: 1GiB }
  large: { cpus: 4, memory: 8GiB, disk: 40GiB }
images:
  debian-12:
    source: debian.qcow2
    sha256: 2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
    format: qcow2
    os: linux
    arch: amd64
    size: small
`

// written gives the file of a text, with the catalogue beside it.
func written(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range map[string]string{"pools.yaml": text, "images.yaml": catalogue} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "pools.yaml")
}

func TestFile(t *testing.T) {
	path := written(t, `
catalogue: images.yaml
image_max_size: 50GiB
image_max_age: 720h
pools:
  vms:
    labels: [debian, linux]
    provider: libvirt
    capacity: 4
    host_capacity: 6
    warm: 1
    warm_max_age: 30m
    boot_timeout: 90s
    image: debian
    memory: 2GiB
    libvirt:
      uri: qemu:///system
      accelerator: kvm
      storage_pool: solstice
      network: bridge br0
      cpu_quota: 0.5
      disk_bytes_per_second: 100MiB
      domain: <cpu mode="host-model"/>
  strict:
    provider: libvirt
    image_file: /images/x
    image_format: raw
    libvirt: { uri: 'qemu:///system', accelerator: kvm, storage_pool: s, isolation: strict, bridge: sol0, subnet: 10.99.0.0/24, allow: [udp/192.0.2.53:53, 'tcp/10.20.0.0/16:443'] }
  host: { provider: process }
  elsewhere:
    provider: grpc+tls:vms.example.com:7000
    plugin: { tls_ca: ca.pem, tls_cert: cert.pem, tls_key: /keys/key.pem, gateway: 10.0.2.2 }
  started:
    provider: command
    plugin: { command: [./qemuvm, ./arg] }
`)
	f, err := ReadFile(path, "")
	if err != nil {
		t.Fatal(err)
	}
	if len(f.pools) != 5 || f.pools[0].name != "elsewhere" || f.pools[1].name != "host" {
		t.Fatalf("pools %+v", f.pools)
	}
	if f.evict.MaxBytes != 50<<30 || f.evict.MaxAge != 720*time.Hour {
		t.Errorf("images go by %+v", f.evict)
	}
	if got := operator.Target(f.pools[0].Provider); got != "vms.example.com:7000" {
		t.Errorf("target %q", got)
	}
	beside := filepath.Dir(path)
	if p := f.pools[0].Plugin; operator.Beside(path, p.TLSCA) != filepath.Join(beside, "ca.pem") || operator.Beside(path, p.TLSKey) != "/keys/key.pem" || p.Gateway != "10.0.2.2" {
		t.Errorf("plugin %+v", p)
	}
	if p := f.pools[2].Plugin; !slices.Equal(p.Argv(f.pools[2].file), []string{filepath.Join(beside, "qemuvm"), "./arg"}) {
		t.Errorf("plugin %+v", p)
	}
	if l := f.pools[3].Libvirt; l.Subnet.String() != "10.99.0.0/24" || len(l.Allow) != 2 || l.Allow[1].String() != "tcp/10.20.0.0/16:443" {
		t.Errorf("isolation %+v", l)
	}
	vms := f.pools[4]
	if vms.choice.Image.Label != "debian-12" || vms.choice.Size != (image.Size{CPUs: 1, MemoryBytes: 1 << 30}) || vms.Memory != 2<<30 {
		t.Errorf("image %+v, memory %d", vms.choice, vms.Memory)
	}
	if vms.WarmMaxAge != 30*time.Minute || vms.BootTimeout != 90*time.Second || vms.Capacity != 4 || vms.HostCapacity != 6 {
		t.Errorf("pool %+v", vms)
	}
	if l := vms.Libvirt; l.Accelerator != libvirtvm.KVM || l.Network != (network{Type: libvirtvm.NetworkBridge, Name: "br0"}) || l.DiskBytesPerSecond != 100<<20 {
		t.Errorf("libvirt %+v", l)
	}
}

// TestWrongFile: what is wrong is said with its place, all of it.
func TestWrongFile(t *testing.T) {
	const vm = "provider: libvirt, libvirt: { uri: 'qemu:///system' }"
	for name, c := range map[string]struct {
		text string
		want []string
	}{
		"empty":            {"", []string{"no documents"}},
		"age of images":    {"image_max_age: -1h\npools: { a: { provider: process } }", []string{"image_max_age is negative"}},
		"no pools":         {"pools: {}", []string{"there are no pools"}},
		"no YAML":          {"pools: [", []string{"pools.yaml"}},
		"unknown keys":     {"pool: {}\npools:\n  a: { provider: process, warn: 1 }", []string{"line 1: unknown key pool", "line 3: unknown key warn"}},
		"a key twice":      {"pools:\n  a: { provider: process }\n  a: { provider: process }", []string{`line 3: mapping key "a" already defined at line 2`}},
		"no provider":      {"pools: { a: }", []string{"pool a: provider \"\": want process"}},
		"other provider":   {"pools: { a: { provider: docker } }", []string{`provider "docker"`}},
		"name":             {"pools: { 'a b': { provider: process } }", []string{"pool a b: a name is"}},
		"label":            {"pools: { a: { provider: process, labels: ['x y', z, z] } }", []string{`label "x y"`, `label "z" is there twice`}},
		"negative":         {"pools: { a: { provider: process, capacity: -1 } }", []string{"not negative"}},
		"process of VMs":   {"pools: { a: { provider: process, cpus: 2, libvirt: {} } }", []string{"cpus is of machines", "libvirt is of pools whose provider is libvirt"}},
		"libvirt of none":  {"pools: { a: { provider: libvirt } }", []string{"libvirt: is missing", "image is missing"}},
		"no catalogue":     {"pools: { a: { " + vm + ", image: debian } }", []string{"need a catalogue"}},
		"unknown image":    {"catalogue: images.yaml\npools: { a: { " + vm + ", image: debain, size: lage } }", []string{`did you mean "debian"`, `did you mean "large"`}},
		"no default image": {"catalogue: images.yaml\npools: { a: { " + vm + ", image_file: /x } }", []string{"image_format"}},
		"two images":       {"catalogue: images.yaml\npools: { a: { " + vm + ", image: debian, image_file: /x } }", []string{"exclude each other"}},
		"format not said":  {"pools: { a: { " + vm + ", image_file: /x } }", []string{"image_format"}},
		"relative image":   {"pools: { a: { " + vm + ", image_file: x, image_format: raw } }", []string{"absolute"}},
		"bytes":            {"pools: { a: { " + vm + ", image_file: /x, image_format: raw, memory: 12 bananas } }", []string{"line 1", "512MiB"}},
		"network":          {"pools: { a: { provider: libvirt, image_file: /x, image_format: raw, libvirt: { network: a b c } } }", []string{"bridge NAME"}},
		"isolation":        {"pools: { a: { provider: libvirt, image_file: /x, image_format: raw, libvirt: { isolation: a } } }", []string{`isolation "a"`}},
		"network, strict":  {"pools: { a: { provider: libvirt, image_file: /x, image_format: raw, libvirt: { isolation: strict, network: user } } }", []string{"leave network out"}},
		"not strict":       {"pools: { a: { provider: libvirt, image_file: /x, image_format: raw, libvirt: { network: user, allow: ['tcp/10.0.0.1:1'] } } }", []string{"are of isolation: strict"}},
		"allowed":          {"pools:\n  a:\n    libvirt: { allow: [http] }", []string{"line 3", "tcp/10.0.0.5:5432"}},
		"contact":          {"pools: { a: { provider: process, contacts: [host] } }", []string{`contact "host"`}},
		"no command":       {"pools: { a: { provider: command } }", []string{"plugin.command"}},
		"command too much": {"pools: { a: { provider: 'grpc+unix:/s', plugin: { command: [x], env: [A] } } }", []string{"plugin.command", "plugin.env"}},
		"gateway":          {"pools: { a: { provider: command, plugin: { command: [x], gateway: host } } }", []string{`gateway "host"`, "10.0.2.2"}},
		"no certificates":  {"pools: { a: { provider: 'grpc+tls:h:1', plugin: { tls_ca: x } } }", []string{"needs all three"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ReadFile(written(t, c.text), "")
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("error %v, want one that wraps ErrInvalid", err)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q, want %q", err, want)
				}
			}
		})
	}
	if _, err := ReadFile(written(t, "catalogue: none.yaml\npools: { a: { provider: process } }"), ""); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without its catalogue: %v", err)
	}
}

func FuzzFile(f *testing.F) {
	f.Add([]byte("pools: { a: { provider: process, labels: [x] } }"))
	f.Add([]byte("pools:\n  a:\n    provider: libvirt\n    memory: 1GiB\n    libvirt: { uri: 'qemu:///system', network: user }\n"))
	f.Add([]byte("pools: &a { b: *a }"))
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := parse("f", "", data)
		if (file == nil) == (err == nil) {
			t.Fatalf("file %v and error %v", file, err)
		}
		if file != nil && len(file.pools) == 0 {
			t.Error("a good file without pools")
		}
	})
}
