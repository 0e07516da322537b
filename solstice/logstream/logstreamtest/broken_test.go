package logstreamtest

import (
	"bytes"
	"context"
	"iter"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// recorder runs a check and notes its failure.
type recorder struct {
	testing.TB
	ctx      context.Context
	mu       sync.Mutex
	failed   bool
	cleanups []func()
}

func (r *recorder) Helper()                  {}
func (r *recorder) Context() context.Context { return r.ctx }
func (r *recorder) Cleanup(f func())         { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Errorf(string, ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = true
}

func (r *recorder) Fatalf(f string, a ...any) {
	r.Errorf(f, a...)
	runtime.Goexit()
}

func fails(t *testing.T, c check, h Harness) bool {
	ctx, cancel := context.WithCancel(t.Context())
	r := &recorder{TB: t, ctx: ctx}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			cancel()
			for _, f := range slices.Backward(r.cleanups) {
				f()
			}
		}()
		c.run(r, h)
	}()
	<-done
	return r.failed
}

// memory is the smallest right implementation; its flaws break one promise
// each.
type memory struct {
	disk  *disk
	flaw  string
	done  chan struct{}
	close sync.Once
}

// disk is what survives a memory and what several share.
type disk struct {
	mu      sync.Mutex
	streams map[string]*kept
	changed chan struct{}
}

type kept struct {
	logstream.Info
	data  []byte
	marks []logstream.Mark
}

func (m *memory) is(flaw string) bool { return m.flaw == flaw }

func (m *memory) begin(ctx context.Context) error {
	if err := ctx.Err(); err != nil && !m.is("ignores ctx") {
		return err
	}
	select {
	case <-m.done:
		if !m.is("works when closed") {
			return logstream.ErrClosed
		}
	default:
	}
	return nil
}

func (m *memory) broadcast() {
	if !m.is("never wakes followers") {
		close(m.disk.changed)
		m.disk.changed = make(chan struct{})
	}
}

func (m *memory) Append(ctx context.Context, name string, o logstream.AppendOptions, off int64, p []byte) (int64, error) {
	if err := logstream.ValidateAppend(name, o, off, p); err != nil && !m.is("validates nothing") {
		return 0, err
	}
	if err := m.begin(ctx); err != nil {
		return 0, err
	}
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	st := m.disk.streams[name]
	exists := st != nil
	if !exists {
		st = &kept{Info: logstream.Info{Stream: name}}
	}
	end := off + int64(len(p))
	if o.Epoch < st.Epoch && !m.is("does not fence appends") {
		return 0, logstream.ErrFenced
	}
	if m.is("refused raises epoch") {
		st.Epoch = max(st.Epoch, o.Epoch)
	}
	if off > st.Size {
		if st.Sealed {
			return 0, logstream.ErrSealed
		}
		if m.is("gap is a conflict") {
			return 0, logstream.ErrConflict
		}
		return 0, &logstream.OffsetError{Stream: name, Want: st.Size, Got: off}
	}
	n := min(st.Size, end) - off
	if m.is("refuses overlaps") && n > 0 && n < int64(len(p)) {
		return 0, logstream.ErrConflict
	}
	if m.is("refuses repeats") && n > 0 {
		return 0, logstream.ErrConflict
	}
	if !m.is("overlooks conflicts") && !bytes.Equal(st.data[off:off+n], p[:n]) {
		return 0, logstream.ErrConflict
	}
	if st.Sealed && !m.is("grows when sealed") {
		if end > st.Size {
			return 0, logstream.ErrSealed
		}
		return end, nil
	}
	if len(p) == 0 && m.is("drops empty appends") {
		return end, nil
	}
	fresh := p[n:]
	if m.is("stores repeats again") && len(fresh) == 0 {
		fresh = p
	}
	if m.is("loses appends") && off > 0 {
		return end, nil
	}
	if m.is("keeps the buffer") && len(st.data) == 0 {
		st.data = fresh[:len(fresh):len(fresh)]
	} else {
		st.data = append(st.data, fresh...)
	}
	for i, mk := range o.Marks {
		switch {
		case mk.Offset >= st.Size:
			st.marks = append(st.marks, mk)
		case i+1 < len(o.Marks) && o.Marks[i+1].Offset <= st.Size, len(fresh) == 0, m.is("loses marks of repeats"):
		default:
			mk.Offset = st.Size
			st.marks = append(st.marks, mk)
		}
	}
	st.Epoch, st.Size = o.Epoch, int64(len(st.data))
	m.disk.streams[name] = st
	if m.is("loses a byte of the largest") && st.Size >= 64<<20 {
		st.data[99] ^= 1
	}
	m.broadcast()
	return end, nil
}

func (m *memory) Seal(ctx context.Context, name string, o logstream.SealOptions) error {
	if err := logstream.ValidateSeal(name, o); err != nil && !m.is("validates nothing") {
		return err
	}
	if err := m.begin(ctx); err != nil {
		return err
	}
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	st := m.disk.streams[name]
	if st == nil {
		if m.is("seals only what exists") {
			return logstream.ErrNotFound
		}
		st = &kept{Info: logstream.Info{Stream: name}}
	}
	s := sum(string(st.data))
	switch {
	case o.Epoch < st.Epoch && !m.is("does not fence seals"):
		return logstream.ErrFenced
	case o.Size >= 0 && o.Size != st.Size && !m.is("seals any size"), o.SHA256 != nil && !bytes.Equal(s, o.SHA256) && !m.is("seals any hash"):
		return logstream.ErrConflict
	case o.Size < 0 && m.is("wants a size"):
		return logstream.ErrConflict
	case st.Sealed && m.is("seals once"):
		return logstream.ErrSealed
	case st.Sealed && !m.is("raises a seal's epoch"):
		return nil
	}
	st.Sealed, st.SHA256, st.Epoch = true, s, o.Epoch
	m.disk.streams[name] = st
	m.broadcast()
	return nil
}

func (m *memory) Stat(ctx context.Context, name string) (logstream.Info, error) {
	if err := logstream.ValidateStream(name); err != nil && !m.is("validates nothing") {
		return logstream.Info{}, err
	}
	if err := m.begin(ctx); err != nil {
		return logstream.Info{}, err
	}
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	if st := m.disk.streams[name]; st != nil {
		return st.Info, nil
	}
	if m.is("finds everything") {
		return logstream.Info{Stream: name}, nil
	}
	return logstream.Info{}, logstream.ErrNotFound
}

func (m *memory) Delete(ctx context.Context, name string) error {
	if err := logstream.ValidateStream(name); err != nil && !m.is("validates nothing") {
		return err
	}
	if err := m.begin(ctx); err != nil {
		return err
	}
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	if m.is("deletes nothing") {
		return nil
	}
	if m.disk.streams[name] == nil && m.is("deletes only what exists") {
		return logstream.ErrNotFound
	}
	delete(m.disk.streams, name)
	m.broadcast()
	return nil
}

func (m *memory) Tail(ctx context.Context, name string, pos int64) iter.Seq2[logstream.Chunk, error] {
	return func(yield func(logstream.Chunk, error) bool) {
		err := logstream.ValidateStream(name)
		if pos < 0 {
			err = logstream.ErrInvalid
		}
		if m.is("validates nothing") {
			err, pos = nil, max(pos, 0)
		}
		if err == nil {
			err = m.begin(ctx)
		}
		if err == nil {
			err = m.follow(ctx, name, pos, func(c logstream.Chunk) bool { return yield(c, nil) })
		}
		if err != nil {
			yield(logstream.Chunk{}, err)
		}
	}
}

func (m *memory) follow(ctx context.Context, name string, pos int64, yield func(logstream.Chunk) bool) error {
	seen := false
	for {
		m.disk.mu.Lock()
		st, changed := m.disk.streams[name], m.disk.changed
		var cur kept
		if st != nil {
			cur = *st
		}
		m.disk.mu.Unlock()
		switch {
		case st == nil && (seen && !m.is("followers survive deletion") || m.is("follows only what exists")):
			return logstream.ErrNotFound
		case st != nil && pos < cur.Size:
			seen = true
			end := min(cur.Size, pos+1<<20)
			c := logstream.Chunk{Offset: pos, Data: bytes.Clone(cur.data[pos:end]), Durable: true}
			if m.is("yields from the start") {
				c.Data = bytes.Clone(cur.data[:end])
			}
			for i, mk := range cur.marks {
				if mk.Offset < end && (mk.Offset >= pos || i+1 == len(cur.marks) || cur.marks[i+1].Offset > pos) && !(m.is("forgets the mark in force") && mk.Offset < pos) {
					if m.is("rounds times") {
						mk.Time = mk.Time.Truncate(1e9)
					}
					c.Marks = append(c.Marks, mk)
				}
			}
			if !yield(c) {
				return nil
			}
			pos = end
			if m.is("skips for slow followers") {
				m.disk.mu.Lock()
				if st := m.disk.streams[name]; st != nil && st.Size > pos+100_000 && !st.Sealed || st.Size > 500_000 && st.Size < 2<<20 {
					pos = st.Size
				}
				m.disk.mu.Unlock()
			}
			continue
		case cur.Sealed && pos > cur.Size && !m.is("ignores offsets beyond the end"):
			return &logstream.OffsetError{Stream: name, Want: cur.Size, Got: pos}
		case cur.Sealed && !m.is("follows for ever"):
			return nil
		}
		if seen = seen || st != nil; m.is("followers survive deletion") {
			seen = false
		}
		done, closed := ctx.Done(), m.done
		if m.is("followers survive Close") {
			closed = nil
		}
		select {
		case <-changed:
		case <-done:
			if m.is("ends quietly") {
				return nil
			}
			return ctx.Err()
		case <-closed:
			return logstream.ErrClosed
		}
	}
}

func (m *memory) Close() error {
	m.close.Do(func() { close(m.done) })
	return nil
}

func brokenHarness(flaw string) Harness {
	handle := func(d *disk) logstream.Store { return &memory{disk: d, flaw: flaw, done: make(chan struct{})} }
	fresh := func() *disk { return &disk{streams: map[string]*kept{}, changed: make(chan struct{})} }
	return Harness{
		Open: func(testing.TB) logstream.Store { return handle(fresh()) },
		Reopen: func(_ testing.TB, s logstream.Store) logstream.Store {
			s.Close()
			if flaw == "forgets when closed" {
				return handle(fresh())
			}
			return handle(s.(*memory).disk)
		},
		Second: func(_ testing.TB, s logstream.Store) logstream.Store {
			if flaw == "handles do not share" {
				return handle(fresh())
			}
			return handle(s.(*memory).disk)
		},
		MemoryStored: true,
	}
}

func TestRightImplementationPasses(t *testing.T) { Run(t, brokenHarness("")) }

// Every flaw is found by the checks named with it, and every check finds one.
func TestBrokenImplementationsFail(t *testing.T) {
	defer func(d time.Duration) { patience = d }(patience)
	patience = time.Second // what a right implementation does takes far less
	found := map[string]bool{}
	for flaw, names := range map[string][]string{
		"loses marks of repeats":         {"MarksOfRepeats", "Model"},
		"does not fence appends":         {"Fence", "EmptyAppendFences", "TakeOver"},
		"does not fence seals":           {"Fence", "SealRepeat"},
		"refused raises epoch":           {"RefusedChangesNothing"},
		"gap is a conflict":              {"Gap"},
		"refuses overlaps":               {"Overlap"},
		"stores repeats again":           {"Repeat", "ConcurrentSameBytes"},
		"loses appends":                  {"Append"},
		"refuses repeats":                {"Repeat"},
		"overlooks conflicts":            {"Conflict"},
		"grows when sealed":              {"SealedAppend"},
		"drops empty appends":            {"EmptyAppendFences"},
		"keeps the buffer":               {"AppendKeepsCallersBuffer"},
		"validates nothing":              {"Invalid"},
		"ignores ctx":                    {"Context"},
		"works when closed":              {"Close"},
		"seals only what exists":         {"Seal"},
		"seals any size":                 {"SealRefused"},
		"seals any hash":                 {"SealRefused"},
		"wants a size":                   {"SealAnySize"},
		"seals once":                     {"SealRepeat"},
		"raises a seal's epoch":          {"SealRepeat"},
		"finds everything":               {"NotFound"},
		"deletes nothing":                {"Delete"},
		"deletes only what exists":       {"Delete"},
		"follows only what exists":       {"TailBeforeCreation"},
		"yields from the start":          {"TailFrom"},
		"forgets the mark in force":      {"Marks"},
		"rounds times":                   {"Marks"},
		"never wakes followers":          {"TailPush", "TailMany", "SecondHandle"},
		"followers survive deletion":     {"DeleteEndsFollowers"},
		"followers survive Close":        {"Close", "TailAcrossReopen"},
		"ignores offsets beyond the end": {"TailBeyondEnd"},
		"follows for ever":               {"TailPush"},
		"ends quietly":                   {"TailCancel"},
		"forgets when closed":            {"Reopen", "Model"},
		"handles do not share":           {"SecondHandle", "TakeOver"},
		"skips for slow followers":       {"TailSlow"},
		"loses a byte of the largest":    {"Huge"},
		"folds case":                     {"Names"},
		"cancels on break":               {"TailBreak"},
		"mixes up streams":               {"ConcurrentStreams"},
	} {
		t.Run(flaw, func(t *testing.T) {
			for _, name := range names {
				i := slices.IndexFunc(checks, func(c check) bool { return c.name == name })
				if i < 0 {
					t.Fatalf("no check is called %s", name)
				}
				h := brokenHarness(flaw)
				if wrap := wrappers[flaw]; wrap != nil {
					inner := h.Open
					h = Harness{Open: func(tb testing.TB) logstream.Store { return wrap(inner(tb)) }, MemoryStored: true}
				}
				if !fails(t, checks[i], h) {
					t.Errorf("%s does not find it", name)
				}
				found[name] = true
			}
		})
	}
	for _, c := range checks {
		if !found[c.name] {
			t.Errorf("no broken implementation for the check %s", c.name)
		}
	}
}

// renamed calls a stream by another name.
type renamed struct {
	logstream.Store
	name func(string) string
}

func (r renamed) Append(ctx context.Context, stream string, o logstream.AppendOptions, off int64, p []byte) (int64, error) {
	return r.Store.Append(ctx, r.name(stream), o, off, p)
}

func (r renamed) Tail(ctx context.Context, stream string, from int64) iter.Seq2[logstream.Chunk, error] {
	return r.Store.Tail(ctx, r.name(stream), from)
}

// fragile does not survive a reader that breaks out.
type fragile struct{ logstream.Store }

func (f fragile) Tail(ctx context.Context, stream string, from int64) iter.Seq2[logstream.Chunk, error] {
	return func(yield func(logstream.Chunk, error) bool) {
		for c, err := range f.Store.Tail(ctx, stream, from) {
			if !yield(c, err) {
				f.Store.Close()
				return
			}
		}
	}
}

var wrappers = map[string]func(logstream.Store) logstream.Store{
	"folds case":       func(s logstream.Store) logstream.Store { return renamed{s, strings.ToLower} },
	"mixes up streams": func(s logstream.Store) logstream.Store { return renamed{s, path.Dir} },
	"cancels on break": func(s logstream.Store) logstream.Store { return fragile{s} },
}
