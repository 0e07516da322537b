package libvirtvm

import (
	"encoding/xml"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"libvirt.org/go/libvirtxml"

	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/seed"
)

// namespace of what this driver writes into a domain's metadata.
const namespace = "https://solstice-ci.org/xmlns/machine/1"

// metadata is what a domain says of its machine. It is set with the domain's
// definition, so there is no domain without.
type metadata struct {
	XMLName xml.Name  `xml:"https://solstice-ci.org/xmlns/machine/1 machine"`
	ID      string    `xml:"id"`
	Owner   string    `xml:"owner"`
	Created time.Time `xml:"created"`
	Expires time.Time `xml:"expires"`
	// Started is set once the domain was: one without that does not run is half
	// made.
	Started bool    `xml:"started"`
	Labels  []label `xml:"label"`
}

type label struct {
	Name  string `xml:"name,attr"`
	Value string `xml:",chardata"`
}

// elements are all elements inside a domain's metadata.
type elements struct {
	Machines []metadata `xml:"https://solstice-ci.org/xmlns/machine/1 machine"`
}

var errForeign = errors.New("not a machine of Solstice")

// read gives what a domain's XML says of its machine.
func read(domainXML string) (m metadata, err error) {
	var d libvirtxml.Domain
	if err := d.Unmarshal(domainXML); err != nil {
		return m, fmt.Errorf("domain: %w", err)
	}
	if d.Metadata == nil {
		return m, errForeign
	}
	var e elements
	if err := xml.Unmarshal([]byte("<metadata>"+d.Metadata.XML+"</metadata>"), &e); err != nil {
		return m, fmt.Errorf("metadata of domain %s: %w", d.Name, err)
	}
	if len(e.Machines) != 1 || e.Machines[0].ID != d.Name {
		return m, errForeign
	}
	return e.Machines[0], nil
}

// A volume is named after its machine and the owner, so that it can be told
// whose it is where it is all that is left.
const (
	diskVolume    = "disk.qcow2"
	seedVolume    = "seed"
	consoleVolume = "console"
)

// volume is the name of a machine's volume.
func volume(id, owner, kind string) string {
	return id + "@" + url.QueryEscape(owner) + "@" + kind
}

// volumeOf takes a volume's name apart; what it holds is not a machine's of
// Solstice where ok is false.
func volumeOf(name string) (id, owner string, ok bool) {
	parts := strings.Split(name, "@")
	if len(parts) != 3 || vmprovider.ValidateID(parts[0]) != nil {
		return "", "", false
	}
	owner, err := url.QueryUnescape(parts[1])
	return parts[0], owner, err == nil
}

// blueprint is a machine to be made.
type blueprint struct {
	spec     vmprovider.Spec
	meta     metadata
	poolPath string
	place    place // with isolation
}

func (b blueprint) volume(kind string) string { return volume(b.spec.ID, b.spec.Owner, kind) }
func (b blueprint) path(kind string) string   { return b.poolPath + "/" + b.volume(kind) }

func ptr[T any](v T) *T { return &v }

// domain gives the XML of a machine's domain.
func (c Config) domain(b blueprint) (string, error) {
	s := b.spec
	cpus, memory := s.CPUs, s.MemoryBytes
	if cpus == 0 {
		cpus = c.CPUs
	}
	if memory == 0 {
		memory = c.MemoryBytes
	}
	d := libvirtxml.Domain{
		Type:   map[Accelerator]string{KVM: "kvm", TCG: "qemu"}[c.Accelerator],
		Memory: &libvirtxml.DomainMemory{Value: uint(memory / 1024), Unit: "KiB"},
		VCPU:   &libvirtxml.DomainVCPU{Value: uint(cpus)}, //nolint:gosec // not negative
		OS: &libvirtxml.DomainOS{
			Type:        &libvirtxml.DomainOSType{Arch: c.Arch, Machine: c.Machine, Type: "hvm"},
			BootDevices: []libvirtxml.DomainBootDevice{{Dev: "hd"}},
		},
		// A machine serves one job: it comes up once.
		OnPoweroff: "destroy", OnReboot: "destroy", OnCrash: "destroy",
		Devices: c.devices(b),
	}
	if c.synthetic() {
		d.Type = "test"
	}
	if x86 := c.Arch == "x86_64" || c.Arch == "i686"; x86 {
		d.Features = &libvirtxml.DomainFeatureList{ACPI: &libvirtxml.DomainFeature{}, APIC: &libvirtxml.DomainFeatureAPIC{}}
	}
	if c.Accelerator == KVM {
		d.CPU = &libvirtxml.DomainCPU{Mode: "host-passthrough"}
	}
	if c.CPUQuota > 0 {
		const period = 100_000 // µs
		d.CPUTune = &libvirtxml.DomainCPUTune{
			Period: &libvirtxml.DomainCPUTunePeriod{Value: period},
			Quota:  &libvirtxml.DomainCPUTuneQuota{Value: int64(c.CPUQuota * period)},
		}
	}
	if c.Domain != "" {
		disks := d.Devices.Disks
		d.Devices.Disks = nil
		if err := c.overlay(&d); err != nil {
			return "", invalid("domain: %v", err)
		}
		d.Devices.Disks = append(disks, d.Devices.Disks...)
	}
	meta, err := xml.Marshal(b.meta)
	if err != nil {
		return "", err
	}
	d.Name, d.UUID = s.ID, "" // a new one: the name of a domain with another is refused
	d.Metadata = &libvirtxml.DomainMetadata{XML: string(meta)}
	return d.Marshal()
}

func (c Config) devices(b blueprint) *libvirtxml.DomainDeviceList {
	dev := &libvirtxml.DomainDeviceList{
		Emulator: c.Emulator,
		Disks:    []libvirtxml.DomainDisk{c.disk(b), c.seed(b)},
	}
	if c.synthetic() {
		return dev
	}
	dev.Serials = []libvirtxml.DomainSerial{{
		Source: &libvirtxml.DomainChardevSource{File: &libvirtxml.DomainChardevSourceFile{Path: b.path(consoleVolume), Append: "on"}},
		Target: &libvirtxml.DomainSerialTarget{Port: ptr(uint(0))},
	}}
	dev.RNGs = []libvirtxml.DomainRNG{{
		Model: "virtio", Backend: &libvirtxml.DomainRNGBackend{Random: &libvirtxml.DomainRNGBackendRandom{Device: "/dev/urandom"}},
	}}
	dev.MemBalloon = &libvirtxml.DomainMemBalloon{Model: "none"}
	if c.Arch == "x86_64" || c.Arch == "i686" {
		dev.Panics = []libvirtxml.DomainPanic{{Model: "isa"}}
	}
	nic := libvirtxml.DomainInterface{Model: &libvirtxml.DomainInterfaceModel{Type: "virtio"}}
	switch n := c.Network; n.Type {
	case "":
		nic = c.Isolation.nic(b.place)
	case NetworkUser:
		nic.Source = &libvirtxml.DomainInterfaceSource{User: &libvirtxml.DomainInterfaceSourceUser{}}
	case NetworkNamed:
		nic.Source = &libvirtxml.DomainInterfaceSource{Network: &libvirtxml.DomainInterfaceSourceNetwork{Network: n.Name}}
	case NetworkBridge:
		nic.Source = &libvirtxml.DomainInterfaceSource{Bridge: &libvirtxml.DomainInterfaceSourceBridge{Bridge: n.Name}}
	case NetworkNone:
		return dev
	}
	dev.Interfaces = []libvirtxml.DomainInterface{nic}
	return dev
}

// disk is the overlay. Every format in its chain is named, so that none is
// guessed from what a guest wrote.
func (c Config) disk(b blueprint) libvirtxml.DomainDisk {
	disk := libvirtxml.DomainDisk{
		Device: "disk",
		Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: "qcow2", ErrorPolicy: "report", Discard: "unmap"},
		Source: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: b.path(diskVolume)}},
		Target: &libvirtxml.DomainDiskTarget{Dev: "vda", Bus: "virtio"},
		BackingStore: &libvirtxml.DomainDiskBackingStore{
			Format:       &libvirtxml.DomainDiskFormat{Type: b.spec.Image.Format},
			Source:       &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: b.spec.Image.Path}},
			BackingStore: &libvirtxml.DomainDiskBackingStore{},
		},
	}
	if c.DiskBytesPerSecond > 0 || c.DiskIOPS > 0 {
		disk.IOTune = &libvirtxml.DomainDiskIOTune{TotalBytesSec: uint64(c.DiskBytesPerSecond), TotalIopsSec: uint64(c.DiskIOPS)} //nolint:gosec // not negative
	}
	return disk
}

func (c Config) seed(b blueprint) libvirtxml.DomainDisk {
	disk := libvirtxml.DomainDisk{
		Device:   "disk",
		Driver:   &libvirtxml.DomainDiskDriver{Name: "qemu", Type: "raw"},
		Source:   &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: b.path(seedVolume)}},
		Target:   &libvirtxml.DomainDiskTarget{Dev: "vdb", Bus: "virtio"},
		ReadOnly: &libvirtxml.DomainDiskReadOnly{},
	}
	if c.SeedFormat == seed.ISO {
		disk.Device, disk.Target = "cdrom", &libvirtxml.DomainDiskTarget{Dev: "sda", Bus: "sata"}
	}
	return disk
}

// overlayVolume is the volume of the machine's disk.
func (b blueprint) overlayVolume() (string, error) {
	v := libvirtxml.StorageVolume{
		Name:   b.volume(diskVolume),
		Target: &libvirtxml.StorageVolumeTarget{Format: &libvirtxml.StorageVolumeTargetFormat{Type: "qcow2"}},
		BackingStore: &libvirtxml.StorageVolumeBackingStore{
			Path: b.spec.Image.Path, Format: &libvirtxml.StorageVolumeTargetFormat{Type: b.spec.Image.Format},
		},
	}
	if b.spec.DiskBytes > 0 {
		v.Capacity = &libvirtxml.StorageVolumeSize{Unit: "bytes", Value: uint64(b.spec.DiskBytes)}
	}
	return v.Marshal()
}

// rawVolume is one of n bytes that only its owner may read.
func (b blueprint) rawVolume(kind string, n int) (string, error) {
	v := libvirtxml.StorageVolume{
		Name:       b.volume(kind),
		Capacity:   &libvirtxml.StorageVolumeSize{Unit: "bytes", Value: uint64(n)},
		Allocation: &libvirtxml.StorageVolumeSize{Unit: "bytes", Value: 0},
		Target: &libvirtxml.StorageVolumeTarget{
			Format:      &libvirtxml.StorageVolumeTargetFormat{Type: "raw"},
			Permissions: &libvirtxml.StorageVolumeTargetPermissions{Mode: "0600"},
		},
	}
	return v.Marshal()
}
