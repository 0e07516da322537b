package libvirtvm

import (
	"context"
	"errors"
	"io"
)

// hypervisor is what of libvirt this driver uses, call by call and in plain
// data, so that everything above it is tested without one. Its calls take as
// long as libvirtd does. Errors wrap those below where they are meant.
type hypervisor interface {
	Hostname() (string, error)

	DefineDomain(xml string) error // of one that is there under another UUID: errExists
	StartDomain(name string) error
	StopDomain(name string) error // at once; of one that does not run: errNotRunning
	UndefineDomain(name string) error
	// SetMetadata replaces the element of that namespace in what a next start
	// would use.
	SetMetadata(name, namespace, xml string) error
	Domain(name string) (domain, error)
	Domains() ([]domain, error)

	PoolXML(pool string) (string, error)
	// RefreshPool has libvirt look for files that others made or removed; while one is
	// opened or made: errBusy.
	RefreshPool(pool string) error
	CreateVolume(pool, xml string) error // of one that is there: errExists
	Upload(pool, volume string, content []byte) error
	// Download reads at most length bytes from an offset in bytes, and no further than
	// the end there is now.
	Download(pool, volume string, offset, length int64, w io.Writer) error
	DeleteVolume(pool, volume string) error // of one that somebody opens or changes: errBusy
	Volumes(pool string) ([]string, error)

	Network(name string) (uuid string, err error) // of an active one
	StartNetwork(xml string) error                // a transient one; of one that is there: errExists
	StopNetwork(name string) error

	// Changes calls f with the name of each domain whose state changed, not
	// concurrently, until Close; f does not block.
	Changes(f func(name string)) error
	// Lost is closed when the connection is.
	Lost() <-chan struct{}
	Close()
}

// domain is a snapshot.
type domain struct {
	XML    string // what a next start would use
	Active bool
	Reason string // in words, why it does not run, where known
}

var (
	errNoDomain   = errors.New("no such domain")
	errNoVolume   = errors.New("no such volume")
	errNoPool     = errors.New("no such storage pool")
	errBusy       = errors.New("in use")
	errNoNetwork  = errors.New("no such network")
	errExists     = errors.New("exists")
	errNotRunning = errors.New("not running")
	errLost       = errors.New("the connection to libvirtd is lost")
	errNoSpace    = errors.New("no space left")
)

// call runs one of the hypervisor's calls, which know no context: when ctx ends
// first, the call is left alone, and the error is its cause.
func call[V any](ctx context.Context, f func() (V, error)) (V, error) {
	type result struct {
		v   V
		err error
	}
	done := make(chan result, 1)
	if err := context.Cause(ctx); err != nil {
		var none V
		return none, err
	}
	go func() {
		v, err := f()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
		var none V
		return none, context.Cause(ctx)
	}
}

// do is call for what gives nothing but an error.
func do(ctx context.Context, f func() error) error {
	_, err := call(ctx, func() (struct{}, error) { return struct{}{}, f() })
	return err
}
