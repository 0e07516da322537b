// Package vmprovider makes and destroys the machines that jobs run on.
//
// The interface is what a driver implements; it deals in plain data and knows
// nothing of jobs. Drivers: vmprovider/processvm (a child process, no
// isolation), vmprovider/libvirtvm (virtual machines), vmprovider/memvm (a
// synthetic machine for tests), vmprovider/remotevm (any gRPC server).
// vmprovider/vmprovidertest is the conformance suite that a driver has to pass.
package vmprovider

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"
)

// Errors that callers act on; drivers wrap them, callers use errors.Is.
var (
	ErrNotFound = errors.New("vmprovider: no such machine")
	ErrExists   = errors.New("vmprovider: machine exists")
	// ErrCapacity: the host has no room now; trying again later may help.
	ErrCapacity = errors.New("vmprovider: no capacity")
	// ErrInvalid: the spec cannot be carried out by this driver, ever.
	ErrInvalid = errors.New("vmprovider: invalid argument")
	// ErrUnavailable: the hypervisor cannot be reached.
	ErrUnavailable = errors.New("vmprovider: unavailable")
	ErrClosed      = errors.New("vmprovider: closed")
)

// State of a machine as the hypervisor sees it.
type State string

// States.
const (
	StateCreating State = "creating" // Create has begun and not ended
	StateRunning  State = "running"
	StateStopped  State = "stopped"  // powered off, exited or crashed; its resources are held until Destroy
	StateLeftover State = "leftover" // half-made or half-destroyed: parts exist, of no use but to Destroy
	// StateGone is what Watch and Wait say of a machine that is no more; Get and
	// List never do: Get wraps ErrNotFound.
	StateGone State = ""
)

// Image is the read-only base of a machine's disk; drivers without disks
// ignore it.
type Image struct {
	Path   string // on the hypervisor's host
	Digest string // "sha256:…", of the file
	Format string // "qcow2" or "raw"; never probed
}

// Bootstrap is what a machine needs to fetch and start its agent. A VM driver
// makes a seed disk of it, processvm hands it over in a file.
type Bootstrap struct {
	Contacts    []string          `json:"contacts"`     // host:port of agent endpoints, tried in order
	CA          []byte            `json:"ca"`           // PEM, verifies the endpoints
	Token       string            `json:"token"`        // enrolment token: a secret, single-use
	RunnerURL   string            `json:"runner_url"`   // base URL of agent binaries, /<os>/<arch> is appended
	AgentSHA256 map[string]string `json:"agent_sha256"` // hex by "os/arch"
	Hostname    string            `json:"hostname"`
	InstanceID  string            `json:"instance_id"`
}

// Spec says what to create.
type Spec struct {
	// ID is chosen by the caller, unique for ever: 1 to 63 of a-z, 0-9 and '-',
	// beginning with a letter or digit.
	ID string
	// Owner is the installation that the machine belongs to; List filters by it.
	Owner       string
	Image       Image
	CPUs        int               // 0: the driver's default
	MemoryBytes int64             // 0: the driver's default
	DiskBytes   int64             // 0: the image's size
	Labels      map[string]string // kept with the machine where the hypervisor can
	ExpiresAt   time.Time         // kept with the machine; whoever reaps may act on it
	Bootstrap   Bootstrap
}

// Instance is a machine as the hypervisor knows it: plain data, a snapshot.
type Instance struct {
	ID        string
	Owner     string
	State     State
	Host      string // which host it is on, as the provider names it
	Reason    string // why it is stopped or a leftover, where known
	CreatedAt time.Time
	ExpiresAt time.Time
}

// ListOptions selects machines; empty selects all.
type ListOptions struct {
	Owner string
}

// DestroyOptions has no fields yet; its zero value is the default.
type DestroyOptions struct{}

// Capabilities are what a driver does more or less well.
type Capabilities struct {
	Isolated bool     // the machine cannot reach the host or its neighbours but through the network
	Adopts   bool     // machines survive the process that made them; a new Provider lists them
	Platform []string // "os/arch" that machines can have; empty: depends on the image
}

// Provider is implemented by drivers; all methods are safe for concurrent use
// and honour ctx.
type Provider interface {
	// Create returns once the machine runs (not once it has booted). A repeated
	// ID wraps ErrExists, whoever owns it. A failed or cancelled Create may
	// leave parts behind, which List shows and Destroy removes; one that wraps
	// ErrInvalid, ErrExists or ErrCapacity leaves nothing.
	Create(ctx context.Context, s Spec) (Instance, error)
	// Get wraps ErrNotFound when there is nothing of the machine.
	Get(ctx context.Context, id string) (Instance, error)
	// List yields machines as the hypervisor has them, half-made ones and
	// leftovers too. The error comes with the last pair.
	List(ctx context.Context, o ListOptions) iter.Seq2[Instance, error]
	// Destroy ends the machine and removes all that belongs to it; absent is no
	// error. Each step is tried even if an earlier one failed, and a repeat
	// goes on where the last one stopped. It may be called during Create: once
	// Get knows of the machine, that Create fails, and when both have returned
	// nothing is left. (A Create that Get does not know of yet has not begun.)
	Destroy(ctx context.Context, id string, o DestroyOptions) error
	Capabilities() Capabilities
	// Close releases the provider; a repeat is no error. Where
	// Capabilities.Adopts the machines stay, otherwise they end. All other
	// methods then wrap ErrClosed, except Capabilities; a Create that Close
	// interrupts may leave parts.
	Close() error
}

// Consoler is implemented by drivers that keep what a machine prints.
type Consoler interface {
	// Console gives the console's bytes from power-on, also of a machine that
	// has stopped. With follow the reader blocks at the end until more comes,
	// the machine stops or goes (io.EOF), or ctx ends (its error).
	Console(ctx context.Context, id string, follow bool) (io.ReadCloser, error)
}

// Watcher is implemented by drivers that are told of changes.
type Watcher interface {
	// Watch first yields every machine, as List does, then one zero Instance,
	// which says that these were all, and from then on a snapshot of a machine
	// whenever its state changed, StateGone last. Changes in quick succession
	// may be coalesced into the latest; none is missed after the snapshot. The
	// error comes with the last pair: that of ctx, one that wraps ErrClosed, or
	// why the provider lost sight; watch anew then.
	Watch(ctx context.Context) iter.Seq2[Instance, error]
}

// ImagePreparer is implemented by drivers that can ready an image ahead of the
// first Create.
type ImagePreparer interface {
	PrepareImage(ctx context.Context, img Image) error
}

// As returns p as the optional interface T. A wrapper answers for what it
// wraps through a method As(target any) bool, which gets a *T to fill in.
func As[T any](p Provider) (T, bool) {
	if w, ok := p.(interface{ As(target any) bool }); ok {
		var t T
		return t, w.As(&t)
	}
	t, ok := p.(T)
	return t, ok
}

// ValidateID checks a machine ID; drivers call it before anything else.
func ValidateID(id string) error {
	ok := id != "" && len(id) <= 63 && id[0] != '-'
	for i := 0; ok && i < len(id); i++ {
		c := id[i]
		ok = c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-'
	}
	if !ok {
		return fmt.Errorf("%w: machine id %q: want 1 to 63 of a-z 0-9 - beginning with a letter or digit", ErrInvalid, id)
	}
	return nil
}
