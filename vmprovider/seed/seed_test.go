package seed

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/selfca"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

const agentSum = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

var testCA = sync.OnceValue(func() []byte {
	ca, err := selfca.New("agents.test")
	if err != nil {
		panic(err)
	}
	return ca.PEM()
})

func bootstrap() vmprovider.Bootstrap {
	return vmprovider.Bootstrap{
		Contacts: []string{"10.0.2.2:50052", "[fd00::1]:50052"}, CA: testCA(),
		Token: "secret-token", RunnerURL: "http://10.0.2.2:50053/runner/", AgentSHA256: map[string]string{"linux/amd64": agentSum},
		Hostname: "sol-1", InstanceID: "sol-1",
	}
}

func build(t testing.TB, b vmprovider.Bootstrap, o Options) []byte {
	t.Helper()
	disk, err := Build(b, o)
	if err != nil {
		t.Fatal(err)
	}
	return disk
}

// run runs a program that the test needs.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	exe, err := exec.LookPath(name)
	if err != nil {
		testenv.Missing(t, name, ".mise/tasks/setup/packages installs it: "+err.Error())
	}
	out, err := exec.Command(exe, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func scriptOf(t testing.TB, b vmprovider.Bootstrap, o Options) string {
	t.Helper()
	o.fill()
	script, err := userData(b, o)
	if err != nil {
		t.Fatal(err)
	}
	return string(script)
}

// TestFAT has other programs read the disk.
func TestFAT(t *testing.T) {
	b := bootstrap()
	disk := build(t, b, Options{})
	file := filepath.Join(t.TempDir(), "seed")
	if err := os.WriteFile(file, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "fsck.fat", "-n", file)
	if out := run(t, "blkid", "-p", "-o", "export", file); !strings.Contains(out, "LABEL=CIDATA\n") || !strings.Contains(out, "TYPE=vfat\n") {
		t.Errorf("blkid: %s", out)
	}
	if got := run(t, "mtype", "-i", file, "::user-data"); got != scriptOf(t, b, Options{}) {
		t.Errorf("user-data: %s", got)
	}
	if got := run(t, "mtype", "-i", file, "::meta-data"); got != "instance-id: \"sol-1\"\nlocal-hostname: \"sol-1\"\n" {
		t.Errorf("meta-data: %s", got)
	}
}

func TestISO(t *testing.T) {
	b := bootstrap()
	file := filepath.Join(t.TempDir(), "seed")
	disk := build(t, b, Options{Format: ISO})
	if len(disk) > 1<<20 || len(disk)%2048 != 0 {
		t.Errorf("%d bytes", len(disk))
	}
	if err := os.WriteFile(file, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	if out := run(t, "blkid", "-p", "-o", "export", file); !strings.Contains(out, "LABEL=CIDATA\n") || !strings.Contains(out, "TYPE=iso9660\n") {
		t.Errorf("blkid: %s", out)
	}
	for _, extension := range []string{"-R", "-J"} {
		if got := run(t, "isoinfo", extension, "-x", "/user-data", "-i", file); got != scriptOf(t, b, Options{}) {
			t.Errorf("user-data with %s: %s", extension, got)
		}
	}
	if got := run(t, "isoinfo", "-R", "-x", "/meta-data", "-i", file); !strings.HasPrefix(got, "instance-id: \"sol-1\"\n") {
		t.Errorf("meta-data: %s", got)
	}
}

// TestBadInput: what cannot be carried out is said, and nothing is quoted wrongly.
func TestBadInput(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*vmprovider.Bootstrap)
		want   string
	}{
		"no contacts":              {func(b *vmprovider.Bootstrap) { b.Contacts = nil }, "no contacts"},
		"a contact without port":   {func(b *vmprovider.Bootstrap) { b.Contacts = []string{"a:1", "host"} }, `contact 2, "host": want HOST:PORT`},
		"a contact of two lines":   {func(b *vmprovider.Bootstrap) { b.Contacts = []string{"a:1\nb:2"} }, "contact 1"},
		"port 0":                   {func(b *vmprovider.Bootstrap) { b.Contacts = []string{"a:0"} }, `contact 1, "a:0": port "0": want 1 to 65535`},
		"port 65536":               {func(b *vmprovider.Bootstrap) { b.Contacts = []string{"a:65536"} }, `"65536"`},
		"a port by name":           {func(b *vmprovider.Bootstrap) { b.Contacts = []string{"a:https"} }, `"https"`},
		"a contact at no name":     {func(b *vmprovider.Bootstrap) { b.Contacts = []string{"a..b:1"} }, `"a..b" is no host name`},
		"a contact at no address":  {func(b *vmprovider.Bootstrap) { b.Contacts = []string{"10.0.2.256:1"} }, `"10.0.2.256" is no host name`},
		"a contact at any address": {func(b *vmprovider.Bootstrap) { b.Contacts = []string{"[::]:1"} }, "nobody can be reached at ::"},
		"no CA":                    {func(b *vmprovider.Bootstrap) { b.CA = nil }, "no CA"},
		"a CA in DER":              {func(b *vmprovider.Bootstrap) { b.CA = []byte{0x30, 0x82} }, "the CA, of 2 bytes, holds no certificate in PEM"},
		"a CA without certificate": {func(b *vmprovider.Bootstrap) {
			b.CA = []byte("-----BEGIN PRIVATE KEY-----\nMII=\n-----END PRIVATE KEY-----\n")
		}, "no certificate"},
		"no token":                  {func(b *vmprovider.Bootstrap) { b.Token = "" }, "token"},
		"a token of two lines":      {func(b *vmprovider.Bootstrap) { b.Token = "a\nsolstice-bootstrap\nreboot" }, "token"},
		"no instance":               {func(b *vmprovider.Bootstrap) { b.InstanceID = "" }, "instance ID"},
		"an instance in YAML":       {func(b *vmprovider.Bootstrap) { b.InstanceID = "a: b" }, "instance ID"},
		"a host name with a blank":  {func(b *vmprovider.Bootstrap) { b.Hostname = "a b" }, `host name "a b"`},
		"a host name of no words":   {func(b *vmprovider.Bootstrap) { b.Hostname = "a..b" }, "host name"},
		"a host name with a hyphen": {func(b *vmprovider.Bootstrap) { b.Hostname = "a.-b" }, "host name"},
		"a long host name":          {func(b *vmprovider.Bootstrap) { b.Hostname = strings.Repeat("a", 64) }, "host name"},
		"no URL":                    {func(b *vmprovider.Bootstrap) { b.RunnerURL = "" }, "runner URL"},
		"a URL that is a command":   {func(b *vmprovider.Bootstrap) { b.RunnerURL = "http://host/'$(reboot)'" }, "runner URL"},
		"a URL with a password":     {func(b *vmprovider.Bootstrap) { b.RunnerURL = "http://u:p@host/runner" }, "credentials"},
		"a URL with a bad port":     {func(b *vmprovider.Bootstrap) { b.RunnerURL = "http://host:70000/runner" }, `runner URL "http://host:70000/runner": port "70000"`},
		"a URL without host":        {func(b *vmprovider.Bootstrap) { b.RunnerURL = "http://:80/runner" }, "no host name"},
		"a file's URL":              {func(b *vmprovider.Bootstrap) { b.RunnerURL = "file:///etc" }, "runner URL"},
		"no agent":                  {func(b *vmprovider.Bootstrap) { b.AgentSHA256 = nil }, "no SHA-256"},
		"a short hash":              {func(b *vmprovider.Bootstrap) { b.AgentSHA256 = map[string]string{"linux/amd64": "00"} }, `agent of linux/amd64: "00"`},
		"a platform that is code":   {func(b *vmprovider.Bootstrap) { b.AgentSHA256 = map[string]string{"*) reboot;;": agentSum} }, "want OS/ARCH"},
		"more than fits":            {func(b *vmprovider.Bootstrap) { b.CA = bytes.Repeat(b.CA, 1000) }, "up to 524288 fit"},
	} {
		b := bootstrap()
		c.change(&b)
		_, err := Build(b, Options{})
		if !errors.Is(err, vmprovider.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
			continue
		}
		if !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "secret-token") {
			t.Errorf("%s: %v; want %q, and not the token", name, err, c.want)
		}
	}
	if _, err := Build(bootstrap(), Options{Format: "ext4"}); !errors.Is(err, vmprovider.ErrInvalid) {
		t.Errorf("an unknown format: %v", err)
	}
}

// TestFullest: what is just let in fits on the disk.
func TestFullest(t *testing.T) {
	b := bootstrap()
	n := len(scriptOf(t, b, Options{}))
	b.Token += strings.Repeat("x", maxScript-n)
	for _, format := range []Format{FAT, ISO} {
		file := filepath.Join(t.TempDir(), "seed")
		if err := os.WriteFile(file, build(t, b, Options{Format: format}), 0o600); err != nil {
			t.Fatal(err)
		}
		var got string
		if format == FAT {
			run(t, "fsck.fat", "-n", file)
			got = run(t, "mtype", "-i", file, "::user-data")
		} else {
			got = run(t, "isoinfo", "-R", "-x", "/user-data", "-i", file)
		}
		if got != scriptOf(t, b, Options{}) {
			t.Errorf("%s: user-data has %d bytes", format, len(got))
		}
	}
	b.Token += "x"
	if _, err := Build(b, Options{}); !errors.Is(err, vmprovider.ErrInvalid) {
		t.Errorf("a byte more: %v", err)
	}
}

// TestGoodAddresses: what guests may be told to connect to.
func TestGoodAddresses(t *testing.T) {
	for _, host := range []string{"a", "orchestrator_1", "a.example.", "10.0.2.2", "fd00::1", "fe80::1%eth0", "3com.example"} {
		if err := checkAddress(host, "65535"); err != nil {
			t.Error(err)
		}
	}
}
