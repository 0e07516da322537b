package telemetry

import (
	"context"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"
)

// Sampling thins out the records below info of one call site: in each second
// the first First pass, then one in Every. The first record of a later second
// says in the attribute "sampled_out" how many were left out before it.
type Sampling struct {
	First int // zero: 100; negative: no sampling
	Every int // zero: 100
}

// handler filters by package, samples, and adds package and trace identifiers
// at the top level of the record, also when groups are open.
type handler struct {
	next   slog.Handler // has the attributes that were added outside of groups
	groups []openGroup
	shared *handlerShared
}

type openGroup struct {
	name  string
	attrs []slog.Attr
}

type handlerShared struct {
	filter   Filter
	lowest   slog.Level
	sampling Sampling
	sites    sync.Map // program counter -> *site: bounded by the program's size
}

// site is what is known of one place in the program that logs.
type site struct {
	pkg   string
	level slog.Level

	mu      sync.Mutex
	second  int64
	seen    int
	skipped int
}

func newHandler(next slog.Handler, f Filter, s Sampling) *handler {
	if s.First == 0 {
		s.First = 100
	}
	if s.Every == 0 {
		s.Every = 100
	}
	return &handler{next: next, shared: &handlerShared{filter: f, lowest: f.lowest(), sampling: s}}
}

// Enabled does not know the package yet; Handle decides.
func (h *handler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.shared.lowest }

func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	s := h.shared.site(r.PC)
	if r.Level < s.level {
		return nil
	}
	skipped, ok := 0, true
	if r.Level < slog.LevelInfo && h.shared.sampling.First > 0 {
		skipped, ok = s.sample(r.Time, h.shared.sampling)
	}
	if !ok {
		return nil
	}
	top := make([]slog.Attr, 0, 4+r.NumAttrs())
	if s.pkg != "" {
		top = append(top, slog.String("pkg", s.pkg))
	}
	if sc := trace.SpanContextFromContext(ctx); sc.IsValid() {
		top = append(top, slog.String("trace_id", sc.TraceID().String()), slog.String("span_id", sc.SpanID().String()))
	}
	if skipped > 0 {
		top = append(top, slog.Int("sampled_out", skipped))
	}
	own := make([]slog.Attr, 0, r.NumAttrs())
	r.Attrs(func(a slog.Attr) bool { own = append(own, a); return true })
	for _, g := range slices.Backward(h.groups) {
		own = []slog.Attr{{Key: g.name, Value: slog.GroupValue(slices.Concat(g.attrs, own)...)}}
	}
	out := slog.NewRecord(r.Time, r.Level, r.Message, r.PC)
	out.AddAttrs(append(top, own...)...)
	return h.next.Handle(ctx, out)
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	if len(attrs) == 0 {
		return h
	}
	c := *h
	if len(h.groups) == 0 {
		c.next = h.next.WithAttrs(attrs)
		return &c
	}
	c.groups = slices.Clone(h.groups)
	last := &c.groups[len(c.groups)-1]
	last.attrs = slices.Concat(last.attrs, attrs)
	return &c
}

func (h *handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	c := *h
	c.groups = append(slices.Clone(h.groups), openGroup{name: name})
	return &c
}

func (sh *handlerShared) site(pc uintptr) *site {
	if s, ok := sh.sites.Load(pc); ok {
		return s.(*site)
	}
	s := &site{level: sh.filter.Level("")}
	if pc != 0 {
		f, _ := runtime.CallersFrames([]uintptr{pc}).Next()
		s.pkg = packageOf(f.Function)
		s.level = sh.filter.Level(s.pkg)
	}
	got, _ := sh.sites.LoadOrStore(pc, s)
	return got.(*site)
}

// sample counts a record made at t; ok says whether it passes, skipped how many
// did not since it was last said.
func (s *site) sample(t time.Time, o Sampling) (skipped int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sec := t.Unix(); sec != s.second {
		skipped, s.second, s.seen, s.skipped = s.skipped, sec, 0, 0
	}
	s.seen++
	if s.seen > o.First && (s.seen-o.First)%o.Every != 0 {
		s.skipped++
		return 0, false
	}
	return skipped, true
}
