package solstice

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// ErrNoSpace: the disk of the state, the logs or the machines is full, or nearly
// so. Once there is room again what it says was not done can be.
var ErrNoSpace = errors.New("solstice: no space left")

// Space is the room on disk that an engine needs to take on work. Below it the
// engine accepts no runs (ErrNoSpace), takes no run requests from the queue,
// begins no jobs and is not ready, so that those under way have what is left for
// their logs. It goes on by itself once there is a tenth more.
type Space struct {
	// Dirs are on the file systems that are looked at, every second: those of a
	// SQLite file, of logs, blobs and machines. Without any, as on systems that
	// do not tell, intake stops when a write fails for want of space.
	Dirs []string
	// MinFree bytes have to be free at each, for users that are not root;
	// 0: 256 MiB.
	MinFree int64
}

// space watches the room on disk.
type space struct {
	Space
	free   func(dir string) (int64, error) // bytes
	recent time.Duration                   // how long a failed write counts

	mu      sync.Mutex
	why     string        // there is no room; empty: there is
	changed chan struct{} // closed and replaced whenever that changes
	failed  time.Time     // when a write failed last
	failure error
	bytes   map[string]int64
	unknown map[string]bool
}

func newSpace(s Space, recent time.Duration) *space {
	orDefault(&s.MinFree, 256<<20)
	return &space{Space: s, free: freeBytes, recent: recent, changed: make(chan struct{}), bytes: map[string]int64{}, unknown: map[string]bool{}}
}

// state says why there is no room, empty when there is; changed is closed when
// that is so no more.
func (s *space) state() (why string, changed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.why, s.changed
}

// err refuses work while there is no room.
func (s *space) err() error {
	if why, _ := s.state(); why != "" {
		return fmt.Errorf("%w: %s", ErrNoSpace, why)
	}
	return nil
}

// look measures, and reports whether the answer is another one than before.
// odd are directories that cannot be measured, each once. Measuring may hang,
// on a network file system that is away, so nobody waits for it.
func (s *space) look() (why string, changed bool, odd []error) {
	free, errs := map[string]int64{}, map[string]error{}
	for _, dir := range s.Dirs {
		if n, err := s.free(dir); err != nil {
			errs[dir] = err
		} else {
			free[dir] = n
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.failed) < s.recent {
		why = s.failure.Error()
	}
	for _, dir := range s.Dirs {
		if err := errs[dir]; err != nil {
			if !s.unknown[dir] && !errors.Is(err, errors.ErrUnsupported) {
				odd = append(odd, fmt.Errorf("%s: %w", dir, err))
			}
			s.unknown[dir] = true
			continue
		}
		n := free[dir]
		s.unknown[dir] = false
		s.bytes[dir] = n
		need := s.MinFree
		if s.why != "" {
			need += s.MinFree / 10
		}
		if n < need && why == "" {
			why = fmt.Sprintf("%s has %d MiB free, %d are needed", dir, n>>20, need>>20)
		}
	}
	if changed = (why == "") != (s.why == ""); changed {
		close(s.changed)
		s.changed = make(chan struct{})
	}
	s.why = why
	return why, changed, odd
}

// measured is what was free at the last look, by directory.
func (s *space) measured() map[string]int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.bytes)
}

// note remembers a write that failed for want of space, and reports whether
// this one did.
func (s *space) note(err error) bool {
	if !sqldb.IsFull(err) && !errors.Is(err, logstream.ErrNoSpace) && !errors.Is(err, blobstore.ErrNoSpace) {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed, s.failure = time.Now(), err
	return true
}

// noted is err, which wraps ErrNoSpace where it says that a disk is full.
func (e *Engine) noted(err error) error {
	if err == nil || !e.space.note(err) {
		return err
	}
	e.lookSpace(context.Background())
	return fmt.Errorf("%w: %w", ErrNoSpace, err)
}

func (e *Engine) lookSpace(ctx context.Context) {
	why, changed, odd := e.space.look()
	for _, err := range odd {
		e.log.WarnContext(ctx, "room on disk not known", "error", err)
	}
	switch {
	case changed && why != "":
		e.log.ErrorContext(ctx, "no room on disk: no runs are accepted and no jobs begun until there is", "why", why)
	case changed:
		e.log.InfoContext(ctx, "there is room on disk again")
		for _, p := range e.pools {
			p.kick.set()
		}
	}
}

func (e *Engine) spaceLoop(ctx context.Context) {
	tick := time.NewTicker(min(time.Second, e.cfg.Timing.Tick))
	defer tick.Stop()
	for {
		e.lookSpace(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// withRoom runs f once there is room on disk, and ends it when there is none.
func (e *Engine) withRoom(ctx context.Context, f func(context.Context)) {
	why, changed := e.space.state()
	for why != "" {
		select {
		case <-ctx.Done():
			return
		case <-changed:
			why, changed = e.space.state()
		}
	}
	running, stop := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-running.Done():
		case <-changed:
			stop()
		}
	})
	f(running)
	stop()
	watch.Wait()
}
