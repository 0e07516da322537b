package blobstoretest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io"
	"iter"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/blobstore/memblob"
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
	r := &recorder{TB: t, ctx: t.Context()}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			for _, f := range slices.Backward(r.cleanups) {
				f()
			}
		}()
		c.run(r, h)
	}()
	<-done
	return r.failed
}

// flawed is a right store with one flaw. Handles share the store beneath.
type flawed struct {
	blobstore.Store
	flaw   string
	shared *shared
}

type shared struct {
	mu     sync.Mutex
	closed bool
	left   []string
}

// urls gives out and serves the URLs of all flawed stores.
type urls struct {
	once   sync.Once
	server *httptest.Server
	mu     sync.Mutex
	grants map[string]grant // by path
}

type grant struct {
	f       *flawed
	method  string
	key     string
	expires time.Time
}

var granted urls

func (u *urls) add(g grant) string {
	u.once.Do(func() { u.server, u.grants = httptest.NewServer(u), map[string]grant{} })
	u.mu.Lock()
	defer u.mu.Unlock()
	path := "/" + rand.Text()
	u.grants[path] = g
	return u.server.URL + path + "?" + url.Values{"key": {g.key}}.Encode()
}

func (u *urls) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	u.mu.Lock()
	g, ok := u.grants[r.URL.Path]
	u.mu.Unlock()
	key := r.URL.Query().Get("key")
	if !ok || g.method != r.Method && !g.f.is("URLs are for any method") ||
		g.key != key && !g.f.is("URLs are for any key") ||
		time.Now().After(g.expires) && !g.f.is("URLs live for ever") {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	if r.Method == http.MethodPut {
		if _, err := g.f.Store.Put(r.Context(), key, r.Body, blobstore.PutOptions{}); err != nil {
			w.WriteHeader(http.StatusInternalServerError)
		}
		return
	}
	content, _, err := get(r.Context(), g.f.Store, key, blobstore.GetOptions{})
	if err != nil {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	_, _ = io.WriteString(w, content)
}

func (f *flawed) PresignGet(ctx context.Context, key string, expires time.Duration) (string, error) {
	return f.presign(ctx, http.MethodGet, key, expires)
}

func (f *flawed) PresignPut(ctx context.Context, key string, expires time.Duration) (string, error) {
	return f.presign(ctx, http.MethodPut, key, expires)
}

func (f *flawed) presign(ctx context.Context, method, key string, expires time.Duration) (string, error) {
	if err := blobstore.ValidateKey(key); err != nil {
		return "", err
	}
	if expires <= 0 && !f.is("URLs may be for no time") {
		return "", blobstore.ErrInvalid
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if err := f.begin(); err != nil {
		return "", err
	}
	return granted.add(grant{f, method, key, time.Now().Add(expires)}), nil
}

func (f *flawed) Sweep(ctx context.Context, minAge time.Duration) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if err := f.begin(); err != nil {
		return 0, err
	}
	f.shared.mu.Lock()
	defer f.shared.mu.Unlock()
	if minAge > 0 && !f.is("sweeps the young") || f.is("sweeps nothing") {
		return 0, nil
	}
	n := len(f.shared.left)
	f.shared.left = nil
	return n, nil
}

func (f *flawed) is(flaw string) bool { return f.flaw == flaw }

func (f *flawed) Capabilities() blobstore.Capabilities {
	return blobstore.Capabilities{Durable: true, ContentType: true, MultiWriter: true}
}

// Close leaves the store beneath to the other handles.
func (f *flawed) Close() error {
	f.shared.mu.Lock()
	defer f.shared.mu.Unlock()
	f.shared.closed = true
	return nil
}

func (f *flawed) begin() error {
	f.shared.mu.Lock()
	defer f.shared.mu.Unlock()
	if f.shared.closed && !f.is("works when closed") {
		return blobstore.ErrClosed
	}
	return nil
}

func (f *flawed) key(key string) string {
	if f.is("folds case") {
		return strings.ToLower(key)
	}
	return key
}

func (f *flawed) Put(ctx context.Context, key string, r io.Reader, o blobstore.PutOptions) (blobstore.Info, error) {
	if err := f.begin(); err != nil {
		return blobstore.Info{}, err
	}
	switch f.flaw {
	case "overwrites despite IfAbsent":
		o.IfAbsent = false
	case "looks before it writes":
		if _, err := f.Store.Stat(ctx, key); err == nil && o.IfAbsent {
			return blobstore.Info{}, blobstore.ErrExists
		}
		o.IfAbsent = false
	case "verifies nothing":
		o.Size, o.SHA256 = 0, nil
	case "verifies afterwards":
		data, _ := io.ReadAll(r)
		sum := sha256.Sum256(data)
		bad := o.Size > 0 && o.Size != int64(len(data)) || o.SHA256 != nil && !bytes.Equal(o.SHA256, sum[:])
		o.Size, o.SHA256 = 0, nil
		info, err := f.Store.Put(ctx, key, bytes.NewReader(data), o)
		if err == nil && bad {
			err = blobstore.ErrChecksum
		}
		return info, err
	case "loses content types":
		o.ContentType = ""
	case "keeps the first content type":
		if old, err := f.Store.Stat(ctx, key); err == nil {
			o.ContentType = old.ContentType
		}
		if o.ContentType == "" {
			o.ContentType = "text/plain"
		}
	case "stores what came of a broken reader":
		data, err := io.ReadAll(r)
		if _, perr := f.Store.Put(ctx, key, bytes.NewReader(data), o); perr != nil {
			return blobstore.Info{}, perr
		}
		if err != nil {
			return blobstore.Info{}, err
		}
		return f.Store.Stat(ctx, key)
	case "leaves temporary files":
		info, err := f.Store.Put(ctx, key, r, o)
		if err != nil {
			f.shared.mu.Lock()
			f.shared.left = append(f.shared.left, key)
			f.shared.mu.Unlock()
		}
		return info, err
	case "ignores ctx":
		ctx = context.WithoutCancel(ctx)
	case "cannot replace":
		o.IfAbsent = true
	case "writes in place":
		data, err := io.ReadAll(r)
		if err != nil {
			return blobstore.Info{}, err
		}
		if old, _, err := get(ctx, f.Store, key, blobstore.GetOptions{Length: 1}); err == nil && len(data) > 0 {
			data[0] = old[0]
		}
		r = bytes.NewReader(data)
	case "loses a byte of large objects":
		data, err := io.ReadAll(r)
		if err != nil {
			return blobstore.Info{}, err
		}
		if len(data) > 8<<20 {
			data, o.SHA256 = data[1:], nil
		}
		r = bytes.NewReader(data)
	case "validates nothing":
		if blobstore.ValidateKey(key) != nil {
			return blobstore.Info{}, nil
		}
	case "fails beside deletes":
		if strings.HasPrefix(key, "shared/") {
			if _, err := f.Store.Stat(ctx, key); err != nil {
				return blobstore.Info{}, errors.New("directory is gone")
			}
		}
	}
	under := f.key(key)
	f.shared.mu.Lock()
	f.shared.left = append(f.shared.left, under)
	f.shared.mu.Unlock()
	info, err := f.Store.Put(ctx, under, r, o)
	info.Key = key
	f.shared.mu.Lock()
	defer f.shared.mu.Unlock()
	i := slices.Index(f.shared.left, under)
	if i < 0 {
		_ = f.Store.Delete(ctx, under, blobstore.DeleteOptions{})
		return info, errors.New("the temporary file is gone")
	}
	f.shared.left = slices.Delete(f.shared.left, i, i+1)
	return info, err
}

func (f *flawed) Get(ctx context.Context, key string, o blobstore.GetOptions) (io.ReadCloser, blobstore.Info, error) {
	if err := f.begin(); err != nil {
		return nil, blobstore.Info{}, err
	}
	open := ctx
	switch f.flaw {
	case "ignores ranges":
		o = blobstore.GetOptions{}
	case "ignores lengths":
		o.Length = 0
	case "clamps offsets":
		if info, err := f.Store.Stat(ctx, key); err == nil {
			o.Offset = min(o.Offset, info.Size)
		}
	case "ignores ctx", "readers outlive ctx":
		open = context.WithoutCancel(ctx)
		if f.is("readers outlive ctx") && ctx.Err() != nil {
			return nil, blobstore.Info{}, ctx.Err()
		}
	case "reads what is there now":
		r, info, err := f.Store.Get(ctx, key, o)
		if err != nil {
			return nil, info, err
		}
		return &late{f: f, ctx: ctx, key: key, first: r}, info, nil
	}
	r, info, err := f.Store.Get(open, f.key(key), o)
	info.Key = key
	return r, info, err
}

// late opens its object again for every read.
type late struct {
	f     *flawed
	ctx   context.Context
	key   string
	off   int64
	first io.Closer
}

func (l *late) Read(p []byte) (int, error) {
	r, _, err := l.f.Store.Get(l.ctx, l.key, blobstore.GetOptions{Offset: l.off})
	if err != nil {
		return 0, err
	}
	defer r.Close()
	n, err := r.Read(p)
	l.off += int64(n)
	return n, err
}

func (l *late) Close() error { return l.first.Close() }

func (f *flawed) Stat(ctx context.Context, key string) (blobstore.Info, error) {
	if err := f.begin(); err != nil {
		return blobstore.Info{}, err
	}
	if f.is("ignores ctx") {
		ctx = context.WithoutCancel(ctx)
	}
	info, err := f.Store.Stat(ctx, f.key(key))
	info.Key = key
	if f.is("finds everything") {
		return info, nil
	}
	return info, err
}

func (f *flawed) Delete(ctx context.Context, key string, o blobstore.DeleteOptions) error {
	if err := f.begin(); err != nil {
		return err
	}
	switch f.flaw {
	case "deletes below":
		for info, err := range f.Store.List(ctx, blobstore.ListOptions{Prefix: key + "/"}) {
			if err != nil {
				return err
			}
			_ = f.Store.Delete(ctx, info.Key, o)
		}
	case "deletes only what exists":
		if _, err := f.Store.Stat(ctx, key); err != nil {
			return err
		}
	}
	return f.Store.Delete(ctx, f.key(key), o)
}

func (f *flawed) List(ctx context.Context, o blobstore.ListOptions) iter.Seq2[blobstore.Info, error] {
	return func(yield func(blobstore.Info, error) bool) {
		if err := f.begin(); err != nil {
			yield(blobstore.Info{}, err)
			return
		}
		asked := o
		switch f.flaw {
		case "lists whole elements":
			if i := strings.LastIndexByte(o.Prefix, '/'); o.Prefix != "" && i != len(o.Prefix)-1 {
				o.Prefix += "/"
			}
		case "lists After again":
			o.After = ""
		}
		var all []blobstore.Info
		for info, err := range f.Store.List(ctx, o) {
			if err != nil {
				yield(info, err)
				return
			}
			if f.is("lists After again") && info.Key < asked.After {
				continue
			}
			all = append(all, info)
		}
		if f.is("lists directories first") {
			slices.SortStableFunc(all, func(a, b blobstore.Info) int {
				return slices.Compare(strings.Split(a.Key, "/"), strings.Split(b.Key, "/"))
			})
		}
		for _, info := range all {
			if f.is("fails on what was deleted") {
				if _, err := f.Store.Stat(ctx, info.Key); err != nil {
					yield(blobstore.Info{}, err)
					return
				}
			}
			if f.is("forgets sizes in lists") {
				info.Size = 0
			}
			if !yield(info, nil) {
				return
			}
			if f.is("yields every other") && len(all) > 1 {
				all[1].Key = info.Key
			}
		}
	}
}

func flawedHarness(flaw string) Harness {
	handle := func(inner blobstore.Store) blobstore.Store {
		return &flawed{inner, flaw, &shared{}}
	}
	again := func(_ testing.TB, s blobstore.Store) blobstore.Store { return handle(s.(*flawed).Store) }
	h := Harness{
		Open: func(testing.TB) blobstore.Store { return handle(memblob.New()) },
		Reopen: func(tb testing.TB, s blobstore.Store) blobstore.Store {
			s.Close()
			if flaw == "forgets when closed" {
				return handle(memblob.New())
			}
			return again(tb, s)
		},
		Second: again,
		Leftovers: func(_ testing.TB, s blobstore.Store) []string {
			return s.(*flawed).shared.left
		},
		Abandon: func(_ testing.TB, s blobstore.Store) {
			s.(*flawed).shared.left = append(s.(*flawed).shared.left, "abandoned")
		},
	}
	switch flaw {
	case "handles do not share":
		h.Second = func(testing.TB, blobstore.Store) blobstore.Store { return handle(memblob.New()) }
	case "says more than it shows":
		h.Reopen, h.Second = nil, nil
	}
	return h
}

func TestRightDriverPasses(t *testing.T) { Run(t, flawedHarness("")) }

// Every flaw is found by the checks named with it, and every check finds one.
func TestBrokenDriversFail(t *testing.T) {
	defer func(d time.Duration) { patience = d }(patience)
	patience = 2 * time.Second // a flaw shows sooner than a right driver
	found := map[string]bool{}
	for flaw, names := range map[string][]string{
		"overwrites despite IfAbsent":         {"IfAbsent", "IfAbsentRace", "SecondHandle"},
		"looks before it writes":              {"IfAbsentRace"},
		"verifies nothing":                    {"Verify"},
		"verifies afterwards":                 {"Verify"},
		"loses content types":                 {"RoundTrip"},
		"keeps the first content type":        {"Overwrite"},
		"stores what came of a broken reader": {"FailedPut"},
		"leaves temporary files":              {"FailedPut", "Verify"},
		"ignores ctx":                         {"Context", "FailedPut", "ContextEndsReader"},
		"cannot replace":                      {"Overwrite"},
		"writes in place":                     {"PutRace"},
		"loses a byte of large objects":       {"Large"},
		"validates nothing":                   {"Invalid"},
		"fails beside deletes":                {"DeletePutRace"},
		"ignores ranges":                      {"Range"},
		"ignores lengths":                     {"Range"},
		"clamps offsets":                      {"RangeErrors"},
		"readers outlive ctx":                 {"ContextEndsReader"},
		"reads what is there now":             {"ReaderIsolated"},
		"finds everything":                    {"NotFound", "Delete"},
		"folds case":                          {"Keys"},
		"deletes below":                       {"Delete", "Keys"},
		"deletes only what exists":            {"Delete"},
		"lists whole elements":                {"ListPrefix"},
		"lists After again":                   {"ListResume"},
		"lists directories first":             {"ListOrder"},
		"forgets sizes in lists":              {"ListOrder"},
		"fails on what was deleted":           {"ListWhileDeleting"},
		"yields every other":                  {"ListBreak"},
		"works when closed":                   {"Closed"},
		"forgets when closed":                 {"Reopen"},
		"handles do not share":                {"SecondHandle"},
		"says more than it shows":             {"Reopen", "SecondHandle"},
		"URLs are for any method":             {"Presign"},
		"URLs are for any key":                {"Presign"},
		"URLs live for ever":                  {"PresignExpires"},
		"URLs may be for no time":             {"PresignErrors"},
		"sweeps the young":                    {"Sweep", "SweepSparesPut"},
		"sweeps nothing":                      {"Sweep"},
	} {
		t.Run(flaw, func(t *testing.T) {
			for _, name := range names {
				i := slices.IndexFunc(checks, func(c check) bool { return c.name == name })
				if i < 0 {
					t.Fatalf("no check is called %s", name)
				}
				if !fails(t, checks[i], flawedHarness(flaw)) {
					t.Errorf("%s does not find it", name)
				}
				found[name] = true
			}
		})
	}
	for _, c := range checks {
		if !found[c.name] {
			t.Errorf("no broken driver for the check %s", c.name)
		}
	}
}
