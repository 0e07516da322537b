package libvirtvm

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"regexp"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/seed"
)

// Accelerator is what runs a guest's instructions. It is the operator's to say:
// that there is a /dev/kvm does not mean that it works.
type Accelerator string

// Accelerators.
const (
	KVM Accelerator = "kvm"
	TCG Accelerator = "tcg" // emulation: ten times slower, and no boundary to rely on
)

// NetworkType is how a guest is connected.
type NetworkType string

// Networks.
const (
	// NetworkUser is QEMU's own network: no privileges are needed, the host's
	// loopback is 10.0.2.2, and nothing is isolated.
	NetworkUser NetworkType = "user"
	// NetworkNamed is a network of libvirt, by its name.
	NetworkNamed NetworkType = "network"
	// NetworkBridge is a bridge of the host, by its name.
	NetworkBridge NetworkType = "bridge"
	// NetworkNone is no network, with which no agent can arrive.
	NetworkNone NetworkType = "none"
)

// Network is how guests are connected.
type Network struct {
	Type NetworkType // required
	Name string      // of the network or bridge
}

// Defaults of a Config.
const (
	DefaultCPUs        = 1
	DefaultMemoryBytes = 1 << 30
)

// Config of a provider; zero values give the defaults.
type Config struct {
	// URI says which libvirtd, as in https://libvirt.org/uri.html; required.
	URI string
	// Accelerator is required, except with the test driver.
	Accelerator Accelerator
	// StoragePool is the name of a storage pool of type dir, which is active, and
	// in which nothing else has names with an "@"; required.
	StoragePool string
	// Network is required, unless Isolation makes it.
	Network   Network
	Isolation *Isolation // nil: none

	Arch     string // of the guests, as libvirt calls it; x86_64 if empty
	Machine  string // machine type; q35 for x86_64 and else what the hypervisor prefers, if empty
	Emulator string // program; what the hypervisor prefers if empty
	// SeedFormat is that of the seed disk, FAT if empty. An ISO is in a CD-ROM
	// drive, which not every kernel has a driver for.
	SeedFormat seed.Format

	CPUs        int   // of a machine whose spec says none; 1 if 0
	MemoryBytes int64 // 1 GiB if 0
	// Max is how many machines of this libvirtd may exist, over all installations and
	// processes as far as they are there when one is created; 0: no limit.
	Max int

	// CPUQuota is how much of a host's CPU each of a guest's may use, as in 0.5;
	// 0: all of it. A session's libvirtd cannot.
	CPUQuota float64
	// DiskBytesPerSecond and DiskIOPS bound a guest's disk; 0: no limit.
	DiskBytesPerSecond, DiskIOPS int64

	// Domain is XML that is laid over the domain of each machine, for what this
	// configuration has no word for: elements as inside <domain>. Lists grow by
	// it, everything else is replaced. The name, the owner and the disks are not
	// its to change.
	Domain string

	Logger *slog.Logger // nil: silent

	failpoint func(string) // before each step; tests end the process there
	firewall  firewall     // the kernel's if nil
}

var nameForm = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,100}$`)

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", vmprovider.ErrInvalid, fmt.Sprintf(format, args...))
}

// complete checks a configuration and fills its gaps.
func (c Config) complete() (Config, error) {
	u, err := url.Parse(c.URI)
	if c.URI == "" || err != nil || u.Scheme == "" {
		return c, invalid("URI %q: want one like qemu:///system", c.URI)
	}
	if u.Path == "/session" && c.CPUQuota > 0 {
		return c, invalid("CPU quota with URI %q: only a system's libvirtd can limit CPUs", c.URI)
	}
	if !c.synthetic() && c.Accelerator != KVM && c.Accelerator != TCG {
		return c, invalid("accelerator %q: want %s, or %s where there is no hardware virtualisation", c.Accelerator, KVM, TCG)
	}
	if !nameForm.MatchString(c.StoragePool) {
		return c, invalid("storage pool %q: want the name of one, see virsh pool-list", c.StoragePool)
	}
	if c.Isolation != nil {
		if err := c.checkIsolation(); err != nil {
			return c, err
		}
	}
	switch n := c.Network; n.Type {
	case "":
		if c.Isolation == nil {
			return c, invalid("network type %q: want %s, %s, %s or %s", n.Type, NetworkUser, NetworkNamed, NetworkBridge, NetworkNone)
		}
	case NetworkUser, NetworkNone:
		if n.Name != "" {
			return c, invalid("network of type %s has no name, got %q", n.Type, n.Name)
		}
	case NetworkNamed, NetworkBridge:
		if !nameForm.MatchString(n.Name) {
			return c, invalid("network of type %s: name %q: want that of a %s", n.Type, n.Name, n.Type)
		}
	default:
		return c, invalid("network type %q: want %s, %s, %s or %s", n.Type, NetworkUser, NetworkNamed, NetworkBridge, NetworkNone)
	}
	if c.CPUs < 0 || c.MemoryBytes < 0 || c.Max < 0 || c.DiskBytesPerSecond < 0 || c.DiskIOPS < 0 || c.CPUQuota < 0 || c.CPUQuota > 1 {
		return c, invalid("sizes and limits are not negative, and the CPU quota is between 0 and 1")
	}
	if c.Domain != "" {
		if err := c.checkOverlay(); err != nil {
			return c, invalid("domain: %v", err)
		}
	}
	if c.Arch == "" {
		c.Arch = "x86_64"
	}
	if c.Machine == "" && c.Arch == "x86_64" && !c.synthetic() {
		c.Machine = "q35"
	}
	if c.CPUs == 0 {
		c.CPUs = DefaultCPUs
	}
	if c.MemoryBytes == 0 {
		c.MemoryBytes = DefaultMemoryBytes
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.failpoint == nil {
		c.failpoint = func(string) {}
	}
	if c.firewall == nil {
		c.firewall = kernel{}
	}
	return c, nil
}

// synthetic says that the hypervisor is libvirt's own stand-in for tests.
func (c Config) synthetic() bool {
	u, err := url.Parse(c.URI)
	return err == nil && u.Scheme == "test"
}

// local says that the hypervisor's host is this one.
func (c Config) local() bool {
	u, err := url.Parse(c.URI)
	return err == nil && u.Host == ""
}

// overlay lays the operator's XML over a domain.
func (c Config) overlay(d *libvirtxml.Domain) error {
	return xml.Unmarshal([]byte("<domain>"+c.Domain+"</domain>"), d)
}

// checkOverlay refuses elements that libvirt does not have, which would be lost
// without a word.
func (c Config) checkOverlay() error {
	var d libvirtxml.Domain
	if err := c.overlay(&d); err != nil {
		return err
	}
	understood, err := d.Marshal()
	if err != nil {
		return err
	}
	known, err := paths(understood)
	if err != nil {
		return err
	}
	asked, err := paths("<domain>" + c.Domain + "</domain>")
	if err != nil {
		return err
	}
	for path := range asked {
		if !known[path] {
			return fmt.Errorf("libvirt has no element %s", strings.TrimPrefix(path, "/domain"))
		}
	}
	return nil
}

// paths are the elements of a document, each as /outer/inner.
func paths(doc string) (map[string]bool, error) {
	found := map[string]bool{}
	var path []string
	dec := xml.NewDecoder(strings.NewReader(doc))
	for {
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return found, nil
		}
		if err != nil {
			return nil, err
		}
		switch e := tok.(type) {
		case xml.StartElement:
			path = append(path, e.Name.Local)
			found["/"+strings.Join(path, "/")] = true
		case xml.EndElement:
			path = path[:len(path)-1]
		}
	}
}
