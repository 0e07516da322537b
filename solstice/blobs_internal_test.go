package solstice

import (
	"context"
	"errors"
	"iter"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/blobstore/memblob"
	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// ailing is a store that can be swept and asked for its health.
type ailing struct {
	blobstore.Store
	swept   []time.Duration
	err     error
	checked func() // nil: nothing
}

func (a *ailing) Sweep(_ context.Context, minAge time.Duration) (int, error) {
	a.swept = append(a.swept, minAge)
	return 2, a.err
}

func (a *ailing) Check(context.Context) error {
	if a.checked != nil {
		a.checked()
	}
	return a.err
}

// TestUnfinishedPutsAreSwept: with what nothing lists, once a day.
func TestUnfinishedPutsAreSwept(t *testing.T) {
	a := newArchive(t, testenv.SQLite(t))
	e := a.engine(a.db, testRules, nil)
	s := &ailing{Store: memblob.New()}
	e.cfg.Blobs = s
	a.collect(e)
	if c := a.collect(e); len(s.swept) != 1 || s.swept[0] != putAge || c.objects != 0 {
		t.Errorf("swept %v, %d objects in the second pass", s.swept, c.objects)
	}
	a.pass(lookAgain + time.Minute)
	if c := a.collect(e); len(s.swept) != 2 || c.objects != 2 {
		t.Errorf("swept %v, %d objects", s.swept, c.objects)
	}
	a.pass(lookAgain + time.Minute)
	s.err = errors.New("the blob store is away")
	if _, err := (&collector{e: e}).pass(t.Context()); !errors.Is(err, s.err) {
		t.Errorf("a sweep that fails: %v", err)
	}
}

// aged is a store of objects that are a year old.
type aged struct{ blobstore.Store }

func (a aged) List(ctx context.Context, o blobstore.ListOptions) iter.Seq2[blobstore.Info, error] {
	return func(yield func(blobstore.Info, error) bool) {
		for info, err := range a.Store.List(ctx, o) {
			info.ModTime = info.ModTime.AddDate(-1, 0, 0)
			if !yield(info, err) {
				return
			}
		}
	}
}

// TestInstallationsShareBlobs: the sweep of one leaves the logs of another alone.
func TestInstallationsShareBlobs(t *testing.T) {
	blobs := aged{memblob.New()}
	var engines []*Engine
	for range 2 {
		a := newArchive(t, testenv.SQLite(t))
		e, err := New(Config{DB: a.db, Queue: a.queue, Blobs: blobs, Forges: map[string]forge.Forge{"local": a.forge}})
		a.must(err)
		t.Cleanup(func() { a.must(e.Close()) })
		engines = append(engines, e)
	}
	ctx, stream := t.Context(), "a/log"
	if _, err := engines[0].logs.Append(ctx, stream, logstream.AppendOptions{Epoch: 1}, 0, []byte("hi\n")); err != nil {
		t.Fatal(err)
	}
	if err := engines[0].logs.Seal(ctx, stream, logstream.SealOptions{Epoch: 1, Size: 3}); err != nil {
		t.Fatal(err)
	}
	for _, e := range engines {
		if err := (&collector{e: e}).sweep(ctx); err != nil {
			t.Fatal(err)
		}
	}
	var got []byte
	for c, err := range engines[0].logs.Tail(ctx, stream, 0) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, c.Data...)
	}
	if string(got) != "hi\n" {
		t.Errorf("the log is %q", got)
	}
}

// mute is a queue that answers nothing.
type mute struct{ queue.Queue }

func (mute) Publish(ctx context.Context, _ string, _ []queue.Message, _ queue.PublishOptions) error {
	<-ctx.Done()
	return ctx.Err()
}

// TestReadyNamesTheCulprit: what does not answer is named, and nothing else.
func TestReadyNamesTheCulprit(t *testing.T) {
	a := newArchive(t, testenv.SQLite(t))
	e := a.engine(a.db, testRules, nil)
	well := &ailing{Store: memblob.New()}
	e.cfg.Queue, e.cfg.Blobs = mute{e.cfg.Queue}, well
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	well.checked = cancel // the time is up once the store was asked
	err := e.Ready(ctx)
	if err == nil || !strings.Contains(err.Error(), "queue: ") || strings.Contains(err.Error(), "blob store") {
		t.Errorf("%v; want the queue only", err)
	}
}

// TestReadyAsksTheBlobStore: for its health where it can tell, otherwise for an
// object.
func TestReadyAsksTheBlobStore(t *testing.T) {
	a := newArchive(t, testenv.SQLite(t))
	e := a.engine(a.db, testRules, nil)
	s := &ailing{Store: memblob.New(), err: errors.New("no such bucket")}
	e.cfg.Blobs = s
	if err := e.Ready(t.Context()); !errors.Is(err, s.err) || !errors.Is(err, ErrNotReady) {
		t.Errorf("with a store that is ill: %v", err)
	}
	was := s.err
	s.err = nil
	if err := e.Ready(t.Context()); errors.Is(err, was) {
		t.Errorf("with a store that is well: %v", err)
	}
	e.cfg.Blobs = memblob.New()
	if err := checkBlobs(t.Context(), e.cfg.Blobs); err != nil {
		t.Errorf("with a store that does not tell: %v", err)
	}
	if err := errors.Join(e.cfg.Blobs.Close(), checkBlobs(t.Context(), e.cfg.Blobs)); !errors.Is(err, blobstore.ErrClosed) {
		t.Errorf("with a closed store: %v", err)
	}
}
