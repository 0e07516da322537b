// Package pools makes the pools of an engine from a file, for programs whose
// operators say in a file what machines there are; docs/pools.md describes it.
//
//	file, err := pools.ReadFile("pools.yaml")
//	set, err := file.Open(ctx, pools.Options{Agents: agents, ImageDir: dir})
//	defer set.Close()
//	cfg.Pools, err = set.Pools(pools.Endpoints{Agents: agentAddr, Runner: runnerAddr, Contacts: contacts, RunnerURL: url})
package pools

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/solstice-ci/solstice-go/solstice/daemon/internal/operator"
	"github.com/solstice-ci/solstice-go/vmprovider/image"
	"github.com/solstice-ci/solstice-go/vmprovider/libvirtvm"
	"github.com/solstice-ci/solstice-go/vmprovider/seed"
)

// ErrInvalid: a file of pools is wrong.
var ErrInvalid = errors.New("pools: invalid")

// File is what a file of pools says.
type File struct {
	catalogue *image.Catalogue // nil: none
	imageDir  string           // empty: as Options say
	evict     image.Options    // when images go that nobody uses
	pools     []entry          // by name
}

// entry is one pool of a file.
type entry struct {
	name, file string

	Labels       []string      `yaml:"labels"`
	Provider     string        `yaml:"provider"`
	Host         string        `yaml:"host"`
	Capacity     int           `yaml:"capacity"`
	HostCapacity int           `yaml:"host_capacity"`
	HostBoots    int           `yaml:"host_boots"`
	Warm         int           `yaml:"warm"`
	WarmMaxAge   time.Duration `yaml:"warm_max_age"`
	BootTimeout  time.Duration `yaml:"boot_timeout"`
	Image        string        `yaml:"image"`
	ImageFile    string        `yaml:"image_file"`
	ImageFormat  string        `yaml:"image_format"`
	Size         string        `yaml:"size"`
	CPUs         int           `yaml:"cpus"`
	Memory       bytes         `yaml:"memory"`
	Disk         bytes         `yaml:"disk"`
	Contacts     []string      `yaml:"contacts"`
	RunnerURL    string        `yaml:"runner_url"`
	Libvirt      *libvirt      `yaml:"libvirt"`
	Plugin       *plugin       `yaml:"plugin"`

	choice image.Choice // of Image
}

// libvirt is libvirtvm.Config as a file says it.
type libvirt struct {
	URI                string                `yaml:"uri"`
	Accelerator        libvirtvm.Accelerator `yaml:"accelerator"`
	StoragePool        string                `yaml:"storage_pool"`
	Network            network               `yaml:"network"`
	Isolation          string                `yaml:"isolation"` // empty: none
	Bridge             string                `yaml:"bridge"`
	Subnet             netip.Prefix          `yaml:"subnet"`
	Allow              []libvirtvm.Allowed   `yaml:"allow"`
	Arch               string                `yaml:"arch"`
	Machine            string                `yaml:"machine"`
	Emulator           string                `yaml:"emulator"`
	Seed               seed.Format           `yaml:"seed"`
	CPUQuota           float64               `yaml:"cpu_quota"`
	DiskBytesPerSecond bytes                 `yaml:"disk_bytes_per_second"`
	DiskIOPS           int64                 `yaml:"disk_iops"`
	Domain             string                `yaml:"domain"`
}

// network is written user, none, network NAME or bridge NAME.
type network libvirtvm.Network

// UnmarshalYAML implements yaml.Unmarshaler.
func (n *network) UnmarshalYAML(node *yaml.Node) error {
	words := strings.Fields(node.Value)
	if node.Kind != yaml.ScalarNode || len(words) == 0 || len(words) > 2 {
		return errors.New("a network is written user, none, network NAME or bridge NAME")
	}
	n.Type = libvirtvm.NetworkType(words[0])
	if len(words) == 2 {
		n.Name = words[1]
	}
	return nil
}

// plugin says how a plugin is started or reached.
type plugin struct {
	operator.Plugin `yaml:",inline"`
	Gateway         string `yaml:"gateway"` // empty: not known
}

// bytes is a number of bytes, written like 512MiB.
type bytes int64

// UnmarshalYAML implements yaml.Unmarshaler.
func (b *bytes) UnmarshalYAML(node *yaml.Node) error {
	n, err := image.ParseBytes(node.Value)
	if err != nil || node.Kind != yaml.ScalarNode {
		return errors.New("a number of bytes is written like 512MiB or 20GiB")
	}
	*b = bytes(n)
	return nil
}

// ReadFile reads a file of pools, and the catalogue of images that it names. Paths
// are relative to the file's directory. catalogue is that of pools in a file
// that names none, and may be empty. What is wrong is an error that wraps
// ErrInvalid, or what the system says, and names all of it.
func ReadFile(path, catalogue string) (*File, error) {
	data, err := operator.Read(path, ErrInvalid)
	if err != nil {
		return nil, err
	}
	return parse(path, catalogue, data)
}

// document is the whole file.
type document struct {
	Catalogue    string            `yaml:"catalogue"`
	ImageDir     string            `yaml:"image_dir"`
	ImageMaxSize bytes             `yaml:"image_max_size"`
	ImageMaxAge  time.Duration     `yaml:"image_max_age"`
	Pools        map[string]*entry `yaml:"pools"`
}

func parse(path, catalogue string, data []byte) (*File, error) {
	var doc document
	if err := operator.Parse(path, data, &doc, ErrInvalid); err != nil {
		return nil, err
	}
	if doc.ImageMaxAge < 0 {
		return nil, fmt.Errorf("%w: %s: image_max_age is negative", ErrInvalid, path)
	}
	out := &File{evict: image.Options{MaxBytes: int64(doc.ImageMaxSize), MaxAge: doc.ImageMaxAge}}
	out.imageDir = operator.Beside(path, doc.ImageDir)
	if doc.Catalogue != "" {
		catalogue = operator.Beside(path, doc.Catalogue)
	}
	if catalogue != "" {
		var err error
		if out.catalogue, err = image.ReadFile(catalogue); err != nil {
			return nil, err
		}
	}
	if len(doc.Pools) == 0 {
		return nil, fmt.Errorf("%w: %s: there are no pools", ErrInvalid, path)
	}
	var errs []error
	served := map[string]string{} // label to pool
	for _, name := range slices.Sorted(maps.Keys(doc.Pools)) {
		e := doc.Pools[name]
		if e == nil {
			e = &entry{}
		}
		e.name, e.file = name, path
		if len(e.Labels) == 0 {
			e.Labels = []string{name}
		}
		problems := e.check(out.catalogue)
		for _, l := range e.Labels {
			if other, ok := served[l]; ok && other == name {
				problems = append(problems, fmt.Errorf("label %q is there twice", l))
			}
			served[l] = name
		}
		for _, p := range problems {
			errs = append(errs, fmt.Errorf("%s: pool %s: %w", path, name, p))
		}
		out.pools = append(out.pools, *e)
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, errors.Join(errs...))
	}
	return out, nil
}

var (
	poolName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	label    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$`)
)

// check finds what is wrong with a pool by itself.
func (e *entry) check(c *image.Catalogue) (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !poolName.MatchString(e.name) {
		bad("a name is up to 63 of A-Z a-z 0-9 . _ -")
	}
	for _, l := range e.Labels {
		if !label.MatchString(l) {
			bad("label %q: want up to 100 of A-Z a-z 0-9 . _ : / -", l)
		}
	}
	if e.Capacity < 0 || e.HostCapacity < 0 || e.HostBoots < 0 || e.Warm < 0 || e.CPUs < 0 || e.WarmMaxAge < 0 || e.BootTimeout < 0 {
		bad("numbers and times are not negative")
	}
	kind := e.kind()
	for key, given := range map[string]bool{"libvirt": e.Libvirt != nil, "plugin": e.Plugin != nil} {
		if given && kind != key {
			bad("%s is of pools whose provider is %s", key, map[string]string{"libvirt": "libvirt", "plugin": "command or grpc+…"}[key])
		}
	}
	switch kind {
	case "process":
		for key, given := range map[string]bool{
			"image": e.Image != "", "image_file": e.ImageFile != "", "size": e.Size != "", "cpus": e.CPUs != 0, "memory": e.Memory != 0, "disk": e.Disk != 0,
		} {
			if given {
				bad("%s is of machines, and processes are none", key)
			}
		}
	case "libvirt":
		if e.Libvirt == nil {
			bad("libvirt: is missing: uri, accelerator, storage_pool, and network or isolation")
		}
		if l := e.Libvirt; l != nil {
			switch strict := l.Isolation == "strict"; {
			case l.Isolation != "" && l.Isolation != "none" && !strict:
				bad("libvirt.isolation %q: want none or strict", l.Isolation)
			case strict && l.Network != (network{}):
				bad("libvirt.isolation: strict makes the network: leave network out")
			case !strict && (l.Bridge != "" || l.Subnet.IsValid() || len(l.Allow) > 0):
				bad("libvirt.bridge, subnet and allow are of isolation: strict")
			}
		}
		if e.Image == "" && e.ImageFile == "" && c != nil {
			e.Image = c.DefaultLabel
		}
		if e.Image == "" && e.ImageFile == "" {
			bad("image is missing: a label of the catalogue, which may have a default_label")
		}
	case "plugin":
		p := cmp.Or(e.Plugin, &plugin{})
		errs = append(errs, p.Check(e.Provider, "provider")...)
		if p.Gateway != "" && net.ParseIP(p.Gateway) == nil {
			bad("plugin.gateway %q: want the address at which guests find this computer's loopback, such as 10.0.2.2", p.Gateway)
		}
	default:
		bad("provider %q: want process, libvirt, command, grpc+unix:PATH or grpc+tls:HOST:PORT", e.Provider)
	}
	errs = append(errs, e.choose(c)...)
	for _, c := range e.Contacts {
		if host, port, err := net.SplitHostPort(c); err != nil || host == "" || port == "" {
			bad("contact %q: want HOST:PORT", c)
		}
	}
	return errs
}

// kind is process, libvirt, plugin or nothing.
func (e *entry) kind() string {
	switch {
	case e.Provider == "process", e.Provider == "libvirt":
		return e.Provider
	case operator.IsPlugin(e.Provider):
		return "plugin"
	}
	return ""
}

// choose looks up image and size.
func (e *entry) choose(c *image.Catalogue) (errs []error) {
	if c == nil {
		c = &image.Catalogue{}
		if e.Image != "" || e.Size != "" {
			return []error{errors.New("image and size need a catalogue: say catalogue: FILE at the top")}
		}
	}
	var err error
	switch {
	case e.Image != "" && e.ImageFile != "":
		errs = append(errs, errors.New("image and image_file exclude each other"))
	case e.Image != "":
		if e.choice, err = c.Resolve(e.Image); err != nil {
			errs = append(errs, fmt.Errorf("image: %w", err))
		}
	case e.ImageFile != "" && e.ImageFormat != image.QCOW2 && e.ImageFormat != image.Raw:
		errs = append(errs, fmt.Errorf("image_file needs image_format: %s or %s; formats are never guessed", image.QCOW2, image.Raw))
	case e.ImageFile != "" && !filepath.IsAbs(e.ImageFile):
		errs = append(errs, errors.New("image_file is not an absolute path on the hypervisor's host"))
	}
	if e.ImageFile == "" && e.ImageFormat != "" {
		errs = append(errs, errors.New("image_format goes with image_file"))
	}
	if e.Size != "" {
		if e.choice.Size, err = c.Size(e.Size); err != nil {
			errs = append(errs, fmt.Errorf("size: %w", err))
		}
	}
	return errs
}
