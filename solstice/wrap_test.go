package solstice_test

import (
	"context"
	"fmt"
	"iter"
	"sync"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// fullOnce has no room for the first machines.
type fullOnce struct {
	vmprovider.Provider
	mu   sync.Mutex
	left int
}

// As lets the wrapped driver's optional verbs through.
func (f *fullOnce) As(target any) bool {
	if w, ok := target.(*vmprovider.Watcher); ok {
		*w, ok = vmprovider.As[vmprovider.Watcher](f.Provider)
		return ok
	}
	return false
}

func (f *fullOnce) Create(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
	f.mu.Lock()
	full := f.left > 0
	f.left--
	f.mu.Unlock()
	if full {
		return vmprovider.Instance{}, fmt.Errorf("test: %w", vmprovider.ErrCapacity)
	}
	return f.Provider.Create(ctx, s)
}

// unlisted is a provider that does not say in any time what machines there are.
type unlisted struct{ vmprovider.Provider }

// As lets the consoles through.
func (u unlisted) As(target any) bool {
	if c, ok := target.(*vmprovider.Consoler); ok {
		*c, ok = vmprovider.As[vmprovider.Consoler](u.Provider)
		return ok
	}
	return false
}

func (unlisted) List(ctx context.Context, _ vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
	return func(yield func(vmprovider.Instance, error) bool) {
		<-ctx.Done()
		yield(vmprovider.Instance{}, ctx.Err())
	}
}
