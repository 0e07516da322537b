package remoteforge_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgetest"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/forge/remoteforge"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	pb "github.com/solstice-ci/solstice-go/solstice/api/forgev1"
)

// pluginArg makes the test binary a plugin.
const pluginArg = "__plugin"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == pluginArg {
		if err := plugin(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// plugin is a whole one, as its author would write it.
func plugin(args []string) error {
	flags := flag.NewFlagSet("plugin", flag.ContinueOnError)
	listen := flags.String("listen", "", "unix:PATH")
	pids := flags.String("pids", "", "file for the process's number")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // ends with who started it
		stop()
	}()
	f := &odd{resolve: func(ctx context.Context, ref string) (string, error) {
		if ref == "hang" {
			if err := os.WriteFile(*pids+".hangs", nil, 0o600); err != nil {
				return "", err
			}
			<-ctx.Done()
			return "", ctx.Err()
		}
		return commit, nil
	}}
	if err := os.WriteFile(*pids, fmt.Append(nil, os.Getpid()), 0o600); err != nil {
		return err
	}
	return remoteforge.Serve(ctx, *listen, remoteforge.NewServer(f, remoteforge.ServerOptions{Name: "odd", Version: "1"}), nil)
}

const commit = "89e495e7941cf9e40e6980d14a16bf023ccd4c91"

var repo = forge.Repo{Owner: "team", Name: "app", ID: "7", URL: "https://forge/team/app", CloneURL: "https://forge/team/app.git", DefaultBranch: "main", Private: true}

// odd is a forge that does as it is told; what it was asked is in asked.
type odd struct {
	resolve func(ctx context.Context, ref string) (string, error)
	parse   func(ctx context.Context, r *http.Request, s forge.SecretFunc) (forge.Event, error)
	clone   forge.Clone
	pulls   []forge.PullRequest
	found   []forge.Finding

	mu    sync.Mutex
	asked []any
}

func (o *odd) was(args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.asked = args
}

func (o *odd) Capabilities() forge.Capabilities {
	return forge.Capabilities{Webhooks: o.parse != nil, StatusKeysFold: true}
}
func (o *odd) Close() error { return nil }
func (o *odd) ParseWebhook(ctx context.Context, r *http.Request, s forge.SecretFunc) (forge.Event, error) {
	return o.parse(ctx, r, s)
}

func (o *odd) Resolve(ctx context.Context, r forge.Repo, ref string) (string, error) {
	o.was(r, ref)
	return o.resolve(ctx, ref)
}

func (o *odd) ReadFile(_ context.Context, r forge.Repo, commit, path string) ([]byte, error) {
	o.was(r, commit, path)
	return []byte("content"), nil
}

func (o *odd) ListFiles(_ context.Context, r forge.Repo, commit, dir string) ([]string, error) {
	o.was(r, commit, dir)
	return []string{"\xff", "b"}, nil
}

func (o *odd) CloneInfo(context.Context, forge.Repo, forge.CloneOptions) (forge.Clone, error) {
	return o.clone, nil
}

func (o *odd) ReportStatus(_ context.Context, r forge.Repo, commit string, s forge.Status) error {
	o.was(r, commit, s)
	return nil
}

func (o *odd) MayApprove(_ context.Context, r forge.Repo, u forge.User) (bool, error) {
	o.was(r, u)
	return true, nil
}

func (o *odd) MergeCommit(_ context.Context, r forge.Repo, pr forge.PullRequest) (string, error) {
	o.was(r, pr)
	return commit, nil
}

func (o *odd) PullRequests(_ context.Context, r forge.Repo, limit int) ([]forge.PullRequest, error) {
	o.was(r, limit)
	return o.pulls, nil
}

func (o *odd) Check(_ context.Context, options forge.CheckOptions) ([]forge.Finding, error) {
	o.was(options)
	return o.found, nil
}

func (o *odd) Comment(_ context.Context, r forge.Repo, n int, key, text string) error {
	o.was(r, n, key, text)
	return nil
}

// over is a forge that is reached over the wire, and ends with its server.
type over struct {
	*remoteforge.Forge
	end func()
}

func (o over) Close() error {
	err := o.Forge.Close()
	o.end()
	return err
}

// serve serves a forge, and connects to it.
func serve(tb forgetest.TB, f forge.Forge, o remoteforge.ServerOptions, listen string, server, client *tls.Config) over {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- remoteforge.Serve(ctx, listen, remoteforge.NewServer(f, o), server) }()
	end := sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-done, f.Close()); err != nil {
			tb.Errorf("serve: %v", err)
		}
	})
	r, err := remoteforge.Open(tb.Context(), remoteforge.Config{Target: listen, TLS: client})
	if err != nil {
		end()
		tb.Fatalf("open: %v", err)
	}
	return over{r, end}
}

func socket(tb forgetest.TB) string {
	dir, err := os.MkdirTemp("", "") // TempDir is too long for a socket
	if err != nil {
		tb.Fatalf("%v", err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	return "unix:" + filepath.Join(dir, "s")
}

// served is an odd forge behind a Unix socket.
func served(t *testing.T, o *odd, options remoteforge.ServerOptions) *remoteforge.Forge {
	f := serve(t, o, options, socket(t), nil, nil)
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return f.Forge
}

func TestConformance(t *testing.T) {
	forgetest.Run(t, forgetest.Harness{New: func(tb forgetest.TB) forgetest.Fixture {
		root := tb.TempDir()
		f, err := localgit.Open(tb.Context(), localgit.Config{Root: root})
		if err != nil {
			tb.Fatalf("%v", err)
		}
		git := func(r forge.Repo) forgetest.Git { return forgetest.Git{Dir: filepath.Join(root, r.FullName()+".git")} }
		return forgetest.Fixture{
			Forge: serve(tb, f, remoteforge.ServerOptions{}, socket(tb), nil, nil),
			Repo: func(tb forgetest.TB, name string) forge.Repo {
				r := forge.Repo{Owner: "team", Name: name}
				git(r).Init(tb)
				return r
			},
			Commit: func(tb forgetest.TB, r forge.Repo, branch string, files map[string]forgetest.File) string {
				return git(r).Commit(tb, branch, files)
			},
			Tag: func(tb forgetest.TB, r forge.Repo, name, commit string, annotated bool) {
				git(r).Tag(tb, name, commit, annotated)
			},
			Fetch: func(tb forgetest.TB, c forge.Clone, commit, name string) (string, error) {
				return forgetest.Git{Dir: c.Dir}.Run(tb, "", "cat-file", "blob", commit+":"+name), nil
			},
			Statuses: func(tb forgetest.TB, r forge.Repo, commit string) []forge.Status {
				all, err := f.Statuses(tb.Context(), r, commit)
				if err != nil {
					tb.Errorf("Statuses: %v", err)
				}
				return all
			},
		}
	}})
}

// fill sets everything in v to something, and what it is told not to, not.
func fill(v reflect.Value, n *int) {
	*n++
	switch v.Kind() {
	case reflect.String:
		v.SetString(fmt.Sprintf("text %d", *n))
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(v.Index(0), n)
		fill(v.Index(1), n)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), n)
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Unix(int64(*n), 5).UTC()))
			return
		}
		for i := range v.NumField() {
			fill(v.Field(i), n)
		}
	default:
		panic(v.Kind())
	}
}

// TestNothingIsLost: every field of what goes over the wire arrives.
func TestNothingIsLost(t *testing.T) {
	n := 0
	var e forge.Event
	fill(reflect.ValueOf(&e).Elem(), &n)
	e.Kind, e.Action, e.Ref, e.Commit, e.Before = forge.KindPullRequest, "opened", "refs/pull/1/head", commit, commit
	e.PullRequest.HeadRef, e.PullRequest.BaseRef, e.PullRequest.MergeRef = "head", "base", "refs/pull/1/merge"
	e.PullRequest.HeadCommit, e.PullRequest.BaseCommit = commit, strings.Repeat("b", 40)
	e.ChangedPaths[0] = "\xff is no UTF-8"
	o := &odd{}
	want := e
	o.parse = func(_ context.Context, r *http.Request, s forge.SecretFunc) (forge.Event, error) {
		body, err := forge.ReadWebhook(r)
		secret, serr := s(t.Context(), "team/app")
		o.was(r.Header, string(body), string(secret))
		return want, errors.Join(err, serr)
	}
	f := served(t, o, remoteforge.ServerOptions{Secret: func(context.Context, string) ([]byte, error) { return []byte("the server's"), nil }})
	post := func(body io.Reader) *http.Request {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "/", body)
		if err != nil {
			t.Fatal(err)
		}
		r.Header = http.Header{"X-One": {"1", "\xe9"}, "X-Two": {"2"}}
		return r
	}
	asked := func(what string, args ...any) {
		t.Helper()
		if !reflect.DeepEqual(o.asked, args) {
			t.Errorf("%s: the forge is asked for\n%#v\nwant\n%#v", what, o.asked, args)
		}
	}
	r := post(strings.NewReader("raw \xff body"))
	got, err := f.ParseWebhook(t.Context(), r, nil)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("event:\n%#v, %v\nwant\n%#v", got, err, want)
	}
	asked("ParseWebhook", r.Header, "raw \xff body", "the server's")
	for _, paths := range [][]string{nil, {}} {
		want.ChangedPaths = paths
		if got, err := f.ParseWebhook(t.Context(), post(nil), nil); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("changed paths %#v became %#v, %v", paths, got.ChangedPaths, err)
		}
	}
	if _, err := f.ParseWebhook(t.Context(), post(bytes.NewReader(make([]byte, forge.MaxWebhookBytes))), nil); err != nil {
		t.Errorf("the largest webhook: %v", err)
	}
	want.Commit = "--upload-pack=x"
	if _, err := f.ParseWebhook(t.Context(), post(nil), nil); !errors.Is(err, forge.ErrInvalid) {
		t.Errorf("an event that is not valid: %v", err)
	}

	var s forge.Status
	fill(reflect.ValueOf(&s).Elem(), &n)
	s.State = forge.StatusFailure
	s.Annotations[0].Path = "\xff"
	if err := f.ReportStatus(t.Context(), repo, commit, s); err != nil {
		t.Error(err)
	}
	asked("ReportStatus", repo, commit, s)
	if names, err := f.ListFiles(t.Context(), repo, commit, "d\xff"); err != nil || !slices.Equal(names, []string{"\xff", "b"}) {
		t.Errorf("ListFiles = %q, %v", names, err)
	}
	asked("ListFiles", repo, commit, "d\xff")
	p, _ := forge.As[forge.Permissions](f)
	if may, err := p.MayApprove(t.Context(), repo, e.Sender); err != nil || !may {
		t.Errorf("MayApprove = %v, %v", may, err)
	}
	asked("MayApprove", repo, e.Sender)
	m, _ := forge.As[forge.Merger](f)
	if got, err := m.MergeCommit(t.Context(), repo, *e.PullRequest); err != nil || got != commit {
		t.Errorf("MergeCommit = %q, %v", got, err)
	}
	asked("MergeCommit", repo, *e.PullRequest)
	c, _ := forge.As[forge.Commenter](f)
	if err := c.Comment(t.Context(), repo, 3, "key", "text \xff"); err != nil {
		t.Error(err)
	}
	asked("Comment", repo, 3, "key", "text \uFFFD")
	l, _ := forge.As[forge.PullRequestLister](f)
	bad := *e.PullRequest
	bad.HeadCommit = "HEAD"
	o.pulls = []forge.PullRequest{bad, *e.PullRequest, *e.PullRequest, *e.PullRequest}
	if got, err := l.PullRequests(t.Context(), repo, 2); err != nil || !reflect.DeepEqual(got, o.pulls[1:3]) {
		t.Errorf("PullRequests = %+v, %v", got, err)
	}
	asked("PullRequests", repo, 2)
	checker, _ := forge.As[forge.Checker](f)
	o.found = []forge.Finding{{Level: forge.LevelNotice, What: "a"}, {Level: forge.LevelWarning, What: "b \xff", Advice: "c"}, {Level: "odd", What: "d"}}
	findings, err := checker.Check(t.Context(), forge.CheckOptions{Repos: []forge.Repo{repo}, WebhookURL: "https://ci"})
	if err != nil || len(findings) != 4 || !reflect.DeepEqual(findings[1:], []forge.Finding{
		o.found[0], {Level: forge.LevelWarning, What: "b \uFFFD", Advice: "c"}, {Level: forge.LevelFailure, What: "d"},
	}) {
		t.Errorf("Check = %+v, %v", findings, err)
	}
	asked("Check", forge.CheckOptions{Repos: []forge.Repo{repo}, WebhookURL: "https://ci"})
	defer func() { // a plugin that is away is what is found
		_ = f.Close()
		found, err := checker.Check(t.Context(), forge.CheckOptions{})
		if err != nil || len(found) != 1 || found[0].Level != forge.LevelFailure || found[0].Advice == "" {
			t.Errorf("Check of a plugin that is away: %+v, %v", found, err)
		}
	}()
	if !f.Capabilities().StatusKeysFold {
		t.Error("that keys fold is lost")
	}
	for name, has := range map[string]bool{
		"ChangedPaths": has[forge.ChangedPaths](f), "HeadLister": has[forge.HeadLister](f), "StatusForgetter": has[forge.StatusForgetter](f),
	} {
		if has {
			t.Errorf("it has %s, which the plugin has not", name)
		}
	}
}

func has[T any](f forge.Forge) bool {
	_, ok := forge.As[T](f)
	return ok
}

// TestErrors: what a plugin's forge says arrives, with what callers go by.
func TestErrors(t *testing.T) {
	var err error
	o := &odd{resolve: func(context.Context, string) (string, error) { return "", err }}
	o.parse = func(context.Context, *http.Request, forge.SecretFunc) (forge.Event, error) { return forge.Event{}, err }
	f := served(t, o, remoteforge.ServerOptions{Secret: func(context.Context, string) ([]byte, error) { return nil, nil }})
	for _, is := range []error{
		forge.ErrNotFound, forge.ErrPermission, forge.ErrInvalid, forge.ErrTooLarge, forge.ErrConflict, forge.ErrUnavailable,
		forge.ErrSignature, errors.ErrUnsupported, context.DeadlineExceeded,
	} {
		err = fmt.Errorf("some words \xff: %w", is)
		_, got := f.Resolve(t.Context(), repo, "main")
		if !errors.Is(got, is) || !strings.Contains(got.Error(), "some words") {
			t.Errorf("%v became %v", err, got)
		}
		if errors.Is(got, forge.ErrUnavailable) != (is == forge.ErrUnavailable || is == context.DeadlineExceeded) { //nolint:errorlint // of the list
			t.Errorf("%v: to be tried again: %v", err, got)
		}
	}
	err = fmt.Errorf("wrapped: %w", &forge.RetryError{After: 90 * time.Second, Err: errors.New("slow down")})
	_, got := f.Resolve(t.Context(), repo, "main")
	var retry *forge.RetryError
	if !errors.As(got, &retry) || retry.After != 90*time.Second || !errors.Is(got, forge.ErrUnavailable) || !strings.Contains(got.Error(), "slow down") {
		t.Errorf("%v became %v", err, got)
	}
	err = fmt.Errorf("%w: it is Sunday", forge.ErrIgnored)
	r, rerr := http.NewRequestWithContext(t.Context(), http.MethodPost, "/", nil)
	if rerr != nil {
		t.Fatal(rerr)
	}
	if _, got := f.ParseWebhook(t.Context(), r, nil); !errors.Is(got, forge.ErrIgnored) || !strings.Contains(got.Error(), "it is Sunday") {
		t.Errorf("%v became %v", err, got)
	}
	if _, got := f.Resolve(t.Context(), repo, "\xff"); !errors.Is(got, forge.ErrInvalid) {
		t.Errorf("a ref that is no text: %v", got)
	}
	o.resolve = func(context.Context, string) (string, error) { panic("planted") }
	for range 2 { // it costs the one call only
		if _, got := f.Resolve(t.Context(), repo, "main"); got == nil || !strings.Contains(got.Error(), "panicked") || errors.Is(got, forge.ErrUnavailable) {
			t.Errorf("a panic became %v", got)
		}
	}
}

// TestClone: credentials are checked, and end when they are told to.
func TestClone(t *testing.T) {
	o := &odd{}
	f := served(t, o, remoteforge.ServerOptions{})
	revoked := 0
	o.clone = forge.Clone{
		URL: "https://forge/x.git", Header: map[string]string{"Authorization": "Basic x"}, ExpiresAt: time.Unix(1e9, 0).UTC(),
		Revoke: func(context.Context) error {
			if revoked++; revoked == 1 {
				return forge.ErrUnavailable
			}
			return nil
		},
	}
	c, err := f.CloneInfo(t.Context(), repo, forge.CloneOptions{})
	if err != nil || c.URL != o.clone.URL || !reflect.DeepEqual(c.Header, o.clone.Header) || !c.ExpiresAt.Equal(o.clone.ExpiresAt) || c.Revoke == nil {
		t.Fatalf("CloneInfo = %+v, %v", c, err)
	}
	for i, want := range []error{forge.ErrUnavailable, nil, forge.ErrNotFound} {
		if err := c.Revoke(t.Context()); !errors.Is(err, want) {
			t.Errorf("revocation %d: %v, want %v", i, err, want)
		}
	}
	for name, bad := range map[string]forge.Clone{
		"nothing": {}, "both": {Dir: "/srv/x", URL: "https://x"}, "a command": {URL: "ext::sh -c x"},
		"two lines": {URL: "https://x", Header: map[string]string{"a": "b\nc: d"}},
	} {
		o.clone = bad
		if c, err := f.CloneInfo(t.Context(), repo, forge.CloneOptions{}); !errors.Is(err, forge.ErrInvalid) {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
}

// certificates are of a plugin's server and of its client.
func certificates(t *testing.T) (server, client *tls.Config) {
	t.Helper()
	ca := testenv.NewAuthority(t)
	load := func(name string) (tls.Certificate, *x509.CertPool) {
		issued := ca.Issue(t, name, "127.0.0.1")
		cert, err := tls.LoadX509KeyPair(issued.Cert, issued.Key)
		if err != nil {
			t.Fatal(err)
		}
		pem, err := os.ReadFile(ca.File)
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(pem)
		return cert, roots
	}
	cert, roots := load("plugin")
	server = &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13}
	cert, roots = load("orchestrator")
	return server, &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: roots, MinVersion: tls.VersionTLS13}
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// TestStrangers: without a certificate of the authority nobody is served, and no
// plugin is believed; nothing secret goes without TLS.
func TestStrangers(t *testing.T) {
	server, client := certificates(t)
	foreign, stranger := certificates(t)
	at, other := freeAddr(t), freeAddr(t)
	secret := &odd{clone: forge.Clone{URL: "https://x", Header: map[string]string{"Authorization": "secret"}}}
	f := serve(t, secret, remoteforge.ServerOptions{}, at, server, client)
	defer func() { _ = f.Close() }()
	if c, err := f.CloneInfo(t.Context(), repo, forge.CloneOptions{}); err != nil || c.Header["Authorization"] != "secret" {
		t.Errorf("with a certificate: %v, %v", c, err)
	}
	g := serve(t, &odd{}, remoteforge.ServerOptions{}, other, foreign, stranger)
	defer func() { _ = g.Close() }()
	for name, cfg := range map[string]remoteforge.Config{
		"no certificate":      {Target: at, TLS: &tls.Config{RootCAs: client.RootCAs, MinVersion: tls.VersionTLS13}},
		"another authority's": {Target: at, TLS: &tls.Config{RootCAs: client.RootCAs, Certificates: stranger.Certificates, MinVersion: tls.VersionTLS13}},
		"a foreign plugin":    {Target: other, TLS: client},
	} {
		cfg.ConnectTimeout = 500 * time.Millisecond
		if f, err := remoteforge.Open(t.Context(), cfg); !errors.Is(err, forge.ErrUnavailable) {
			t.Errorf("%s: %v, %v", name, f, err)
		}
	}
	for _, cfg := range []remoteforge.Config{{}, {Target: "unix:"}, {Target: "host"}, {Target: "host:1"}} {
		if _, err := remoteforge.Open(t.Context(), cfg); !errors.Is(err, forge.ErrInvalid) {
			t.Errorf("%+v: %v, want ErrInvalid", cfg, err)
		}
	}
	for _, listen := range []string{"127.0.0.1:0", ""} {
		if err := remoteforge.Serve(t.Context(), listen, remoteforge.NewServer(&odd{}, remoteforge.ServerOptions{}), nil); !errors.Is(err, forge.ErrInvalid) {
			t.Errorf("listen at %q without TLS: %v, want ErrInvalid", listen, err)
		}
	}
}

// TestServerBounds: a call without an end is refused, one with an end gets it, and
// the forge sees when its caller is gone.
func TestServerBounds(t *testing.T) {
	entered, gone := make(chan struct{}, 100), make(chan struct{}, 100)
	o := &odd{resolve: func(ctx context.Context, _ string) (string, error) {
		entered <- struct{}{}
		<-ctx.Done()
		gone <- struct{}{}
		return "", ctx.Err()
	}}
	arrived := func() bool { // a call that ends early may end before
		select {
		case <-entered:
			<-gone
			return true
		default:
			return false
		}
	}
	at := socket(t)
	f := serve(t, o, remoteforge.ServerOptions{}, at, nil, nil)
	defer func() { _ = f.Close() }()
	conn, err := grpc.NewClient(at, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	raw := pb.NewForgeServiceClient(conn)
	if _, err := raw.Info(t.Context(), &pb.InfoRequest{}); err == nil || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("a call without a deadline: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := raw.ParseWebhook(ctx, &pb.ParseWebhookRequest{}); err == nil || !strings.Contains(err.Error(), "Unimplemented") {
		t.Errorf("a webhook of a plugin that has none: %v", err)
	}
	eventually(t, func() bool {
		short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := f.Resolve(short, repo, "main"); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("a short deadline: %v", err)
		}
		return arrived()
	})
	ctx, cancel = context.WithCancel(t.Context())
	go func() {
		<-entered
		cancel()
	}()
	if _, err := f.Resolve(ctx, repo, "main"); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled call: %v", err)
	}
	<-gone
	patient, err := remoteforge.Open(t.Context(), remoteforge.Config{Target: at, CallTimeout: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		if _, err := patient.Resolve(t.Context(), repo, "main"); !errors.Is(err, forge.ErrUnavailable) {
			t.Fatalf("a forge that does not answer: %v", err)
		}
		return arrived()
	})
	if err := patient.Close(); err != nil {
		t.Error(err)
	}
	closing, err := remoteforge.Open(t.Context(), remoteforge.Config{Target: at})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		<-entered
		_ = closing.Close()
	}()
	if _, err := closing.Resolve(t.Context(), repo, "main"); !errors.Is(err, forge.ErrUnavailable) {
		t.Errorf("closed in the middle: %v", err)
	}
	<-gone
}

// eventually waits for a condition until go test's own timeout.
func eventually(t *testing.T, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("it did not happen")
		}
	}
}

// TestKilled: a plugin that is killed in the middle of a call is away for that call,
// started again, and there for the next ones.
func TestKilled(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	pids := filepath.Join(t.TempDir(), "pid")
	f, err := remoteforge.Start(t.Context(), remoteforge.Command{Argv: []string{exe, pluginArg, "-pids", pids}, Output: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	pid := func() (n int) {
		b, err := os.ReadFile(pids)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = fmt.Sscan(string(b), &n)
		return n
	}
	first := pid()
	if name, version := f.Name(); name != "odd" || version != "1" {
		t.Errorf("it is %s %s", name, version)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := f.Resolve(context.WithoutCancel(t.Context()), repo, "hang")
		ended <- err
	}()
	eventually(t, func() bool { _, err := os.Stat(pids + ".hangs"); return err == nil })
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, forge.ErrUnavailable) {
		t.Errorf("killed in the middle: %v, want ErrUnavailable", err)
	}
	eventually(t, func() bool {
		got, err := f.Resolve(t.Context(), repo, "main")
		if err != nil && !errors.Is(err, forge.ErrUnavailable) {
			t.Fatalf("while it is away: %v, want ErrUnavailable", err)
		}
		return got == commit
	})
	second := pid()
	for range 2 { // a repeat is no error
		if err := f.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if err := syscall.Kill(second, 0); !errors.Is(err, syscall.ESRCH) || second == first {
		t.Errorf("the plugin is left: %v", err)
	}
	if _, err := f.Resolve(t.Context(), repo, "main"); !errors.Is(err, forge.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
	if _, err := remoteforge.Start(t.Context(), remoteforge.Command{Argv: []string{"/no/such/plugin"}}); !errors.Is(err, forge.ErrInvalid) {
		t.Errorf("a program that is not there: %v", err)
	}
}
