package seed

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

const agentSum = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func bootstrap() vmprovider.Bootstrap {
	return vmprovider.Bootstrap{
		Contacts: []string{"10.0.2.2:50052", "[fd00::1]:50052"}, CA: []byte("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"),
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
	// The library leaves a cluster that no file has, which harms nobody: with it
	// fsck.fat ends with status 1, and says nothing else.
	said := run(t, "sh", "-c", `fsck.fat -n "$0" || [ $? = 1 ]`, file)
	for line := range strings.Lines(said) {
		if l := strings.TrimSpace(line); l != "" && l != "Reclaimed 1 unused cluster (512 bytes)." && l != "Leaving filesystem unchanged." &&
			!strings.HasPrefix(l, "fsck.fat ") && !strings.HasPrefix(l, file) {
			t.Errorf("fsck.fat: %s", l)
		}
	}
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
	if err := os.WriteFile(file, build(t, b, Options{Format: ISO}), 0o600); err != nil {
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
	for name, change := range map[string]func(*vmprovider.Bootstrap){
		"no contacts":               func(b *vmprovider.Bootstrap) { b.Contacts = nil },
		"a contact without port":    func(b *vmprovider.Bootstrap) { b.Contacts = []string{"host"} },
		"a contact at port 0":       func(b *vmprovider.Bootstrap) { b.Contacts = []string{"host:0"} },
		"a contact at port 65536":   func(b *vmprovider.Bootstrap) { b.Contacts = []string{"host:65536"} },
		"no authority":              func(b *vmprovider.Bootstrap) { b.CA = nil },
		"an authority that is none": func(b *vmprovider.Bootstrap) { b.CA = []byte("x") },
		"a contact of two lines":    func(b *vmprovider.Bootstrap) { b.Contacts = []string{"a:1\nb:2"} },
		"no token":                  func(b *vmprovider.Bootstrap) { b.Token = "" },
		"a token of two lines":      func(b *vmprovider.Bootstrap) { b.Token = "a\nsolstice-bootstrap\nreboot" },
		"no instance":               func(b *vmprovider.Bootstrap) { b.InstanceID = "" },
		"an instance in YAML":       func(b *vmprovider.Bootstrap) { b.InstanceID = "a: b" },
		"a host name with a blank":  func(b *vmprovider.Bootstrap) { b.Hostname = "a b" },
		"no URL":                    func(b *vmprovider.Bootstrap) { b.RunnerURL = "" },
		"a URL that is a command":   func(b *vmprovider.Bootstrap) { b.RunnerURL = "http://host/'$(reboot)'" },
		"a URL with a password":     func(b *vmprovider.Bootstrap) { b.RunnerURL = "http://u:p@host/runner" },
		"a file's URL":              func(b *vmprovider.Bootstrap) { b.RunnerURL = "file:///etc" },
		"no agent":                  func(b *vmprovider.Bootstrap) { b.AgentSHA256 = nil },
		"a short hash":              func(b *vmprovider.Bootstrap) { b.AgentSHA256 = map[string]string{"linux/amd64": "00"} },
		"a platform that is code":   func(b *vmprovider.Bootstrap) { b.AgentSHA256 = map[string]string{"*) reboot;;": agentSum} },
	} {
		b := bootstrap()
		change(&b)
		if _, err := Build(b, Options{}); !errors.Is(err, vmprovider.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
		if err := check(b); err != nil && strings.Contains(err.Error(), "secret-token") {
			t.Errorf("%s: the token is in the error: %v", name, err)
		}
	}
	if _, err := Build(bootstrap(), Options{Format: "ext4"}); !errors.Is(err, vmprovider.ErrInvalid) {
		t.Errorf("an unknown format: %v", err)
	}
}
