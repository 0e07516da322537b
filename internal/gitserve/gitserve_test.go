package gitserve

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// origin is a repository with three commits on main; unreferenced is one more
// that only an object name finds.
type origin struct {
	t                  testing.TB
	git                *gitcmd.Git
	dir                string
	first, tip, orphan string
}

func newOrigin(t testing.TB) *origin {
	t.Helper()
	git, err := gitcmd.Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	o := &origin{t: t, git: git, dir: filepath.Join(t.TempDir(), "origin")}
	o.run(gitcmd.Options{}, "init", "-q", "-b", "main", "--", o.dir)
	o.write("README", "first\n", 0o644)
	o.first = o.commit("first")
	o.write("run.sh", "#!/bin/sh\n", 0o755)
	o.write("sub/dir/file with space", "x", 0o600)
	o.write("skipped", "kept in the tar\n", 0o644)
	o.write(".gitattributes", "skipped export-ignore\nREADME filter=evil export-subst\n", 0o644)
	if err := os.Symlink("README", filepath.Join(o.dir, "link")); err != nil {
		t.Fatal(err)
	}
	o.write(".gitmodules", "[submodule \"m\"]\n\tpath = m\n\turl = https://example.org/m.git\n", 0o644)
	o.run(o.in(), "update-index", "--add", "--cacheinfo", "160000,"+o.first+",m")
	o.commit("second")
	o.write("README", "$Format:%H$\n", 0o644)
	o.tip = o.commit("third")
	o.orphan = o.run(gitcmd.Options{Dir: o.dir, Stdin: strings.NewReader("orphan\n"), Env: identity},
		"commit-tree", "-p", o.tip, o.tip+"^{tree}")
	return o
}

var identity = []string{"GIT_AUTHOR_NAME=A", "GIT_AUTHOR_EMAIL=a@example.org", "GIT_COMMITTER_NAME=A", "GIT_COMMITTER_EMAIL=a@example.org"}

func (o *origin) in() gitcmd.Options { return gitcmd.Options{Dir: o.dir, Env: identity} }

func (o *origin) run(opt gitcmd.Options, args ...string) string {
	o.t.Helper()
	out, err := o.git.Output(o.t.Context(), opt, args...)
	if err != nil {
		o.t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func (o *origin) write(name, content string, mode os.FileMode) {
	o.t.Helper()
	name = filepath.Join(o.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(content), mode)); err != nil {
		o.t.Fatal(err)
	}
}

func (o *origin) commit(message string) string {
	o.t.Helper()
	o.run(o.in(), "add", "--ignore-removal", "--", ".")
	o.run(o.in(), "commit", "-q", "-m", message)
	return o.run(o.in(), "rev-parse", "HEAD")
}

const (
	credential = "Bearer good"
	attempt    = "0190-attempt_1"
)

// serve starts a handler over TLS for the source; client are git's options for it.
func serve(t testing.TB, git *gitcmd.Git, src Source, change func(*Config)) (server *httptest.Server, base string, client gitcmd.Options) {
	t.Helper()
	c := Config{Git: git, TempDir: t.TempDir(), Authorize: func(_ context.Context, r *http.Request, name string) (Source, error) {
		if r.Header.Get("Authorization") != credential || name != attempt {
			return Source{}, errors.New("bad credential")
		}
		return src, nil
	}}
	if change != nil {
		change(&c)
	}
	h, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	server = httptest.NewUnstartedServer(h)
	server.Config.ErrorLog = nil
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	data := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(ca, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return server, server.URL + "/git/" + attempt, gitcmd.Options{
		Protocols: []string{"https"},
		Config:    []string{"http.sslCAInfo=" + ca, "http.extraHeader=Authorization: " + credential},
	}
}

// fetchAll is what a guest's git does, in the given protocol versions.
func fetchAll(t *testing.T, o *origin, base string, client gitcmd.Options, versions ...string) {
	for _, version := range versions {
		t.Run("v"+version, func(t *testing.T) {
			client := client
			client.Config = append([]string{"protocol.version=" + version}, client.Config...)
			for name, tc := range map[string]struct {
				want  string
				depth string
				count string
			}{
				"full":         {o.tip, "", "3"},
				"depth 1":      {o.tip, "--depth=1", "1"},
				"behind tip":   {o.first, "--depth=1", "1"},
				"unreferenced": {o.orphan, "--depth=1", "1"},
			} {
				dir := filepath.Join(t.TempDir(), "clone")
				o.run(gitcmd.Options{}, "init", "-q", "--", dir)
				in := client
				in.Dir = dir
				args := []string{"fetch", "-q"}
				if tc.depth != "" {
					args = append(args, tc.depth)
				}
				if err := o.git.Run(t.Context(), in, append(args, "--", base, "+"+tc.want+":refs/remotes/origin/x")...); err != nil {
					t.Errorf("%s: %v", name, err)
					continue
				}
				o.run(gitcmd.Options{Dir: dir}, "fsck", "--strict")
				if got := o.run(gitcmd.Options{Dir: dir}, "rev-list", "--count", tc.want); got != tc.count {
					t.Errorf("%s: %s commits", name, got)
				}
				if tc.want == o.tip {
					if got := o.run(gitcmd.Options{Dir: dir}, "show", tc.want+":.gitmodules"); !strings.Contains(got, "https://example.org/m.git") {
						t.Errorf("%s: submodule's URL changed: %s", name, got)
					}
				}
			}
		})
	}
}

func TestLocal(t *testing.T) {
	o := newOrigin(t)
	_, base, client := serve(t, o.git, Source{Clone: forge.Clone{Dir: filepath.Join(o.dir, ".git")}, Commit: o.tip}, nil)
	fetchAll(t, o, base, client, "0", "1", "2")
	_, base, client = serve(t, o.git, Source{Clone: forge.Clone{Dir: o.dir}, Commit: o.tip}, nil)
	if err := o.git.Run(t.Context(), client, "ls-remote", "--", base); err != nil {
		t.Error(err)
	}
}

// The forge is another handler of this package: it wants a credential that the
// guest does not have.
func TestProxy(t *testing.T) {
	o := newOrigin(t)
	var leaked []string
	forgeServer, forgeBase, _ := serve(t, o.git, Source{Clone: forge.Clone{Dir: o.dir}, Commit: o.tip}, func(c *Config) {
		c.Authorize = func(_ context.Context, r *http.Request, _ string) (Source, error) {
			if r.Header.Get("Authorization") != "Basic forge" {
				return Source{}, errors.New("not the forge's credential")
			}
			for _, name := range []string{"Cookie", "X-Forwarded-For", "X-Evil"} {
				if r.Header.Get(name) != "" {
					leaked = append(leaked, name)
				}
			}
			return Source{Clone: forge.Clone{Dir: o.dir}, Commit: o.tip}, nil
		}
	})
	src := Source{Clone: forge.Clone{URL: forgeBase, Header: map[string]string{"Authorization": "Basic forge"}}, Commit: o.tip}
	_, base, client := serve(t, o.git, src, func(c *Config) { c.Transport = forgeServer.Client().Transport })
	client.Config = append(client.Config, "http.extraHeader=X-Evil: yes", "http.extraHeader=Cookie: a=b")
	fetchAll(t, o, base, client, "0", "2")
	if leaked != nil {
		t.Errorf("the forge got the guest's headers %v", leaked)
	}
}

func TestProxyAnswers(t *testing.T) {
	git := newOrigin(t).git
	reached := false
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached = true }))
	defer other.Close()
	refuse := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "s3cret detail", status) }
	}
	for name, tc := range map[string]struct {
		handler http.HandlerFunc
		want    int
	}{
		"redirect":     {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other.URL, http.StatusFound) }, 502},
		"html":         {func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "<html>") }, 502},
		"not found":    {refuse(http.StatusNotFound), 404},
		"unauthorised": {refuse(http.StatusUnauthorized), 404},
		"rate limit":   {refuse(http.StatusTooManyRequests), 503},
		"down":         {refuse(http.StatusInternalServerError), 503},
	} {
		upstream := httptest.NewServer(tc.handler)
		src := Source{Clone: forge.Clone{URL: upstream.URL + "/r.git"}, Commit: strings.Repeat("a", 40)}
		server, base, _ := serve(t, git, src, nil)
		resp := get(t, server, base+"/info/refs?service=git-upload-pack", nil)
		if body := read(t, resp); resp.StatusCode != tc.want || strings.Contains(body, "s3cret") {
			t.Errorf("%s: %d %q", name, resp.StatusCode, body)
		}
		upstream.Close()
	}
	if reached {
		t.Error("a redirect was followed")
	}
}

func get(t *testing.T, server *httptest.Server, url string, change func(*http.Request)) *http.Response {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", credential)
	if change != nil {
		change(r)
	}
	resp, err := server.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

func read(t *testing.T, resp *http.Response) string {
	t.Helper()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestTar(t *testing.T) {
	o := newOrigin(t)
	marker := filepath.Join(t.TempDir(), "marker")
	o.run(o.in(), "config", "filter.evil.smudge", "touch "+marker)
	forgeServer, forgeBase, _ := serve(t, o.git, Source{Clone: forge.Clone{Dir: o.dir}, Commit: o.tip}, func(c *Config) {
		local := c.Authorize
		c.Authorize = func(ctx context.Context, r *http.Request, name string) (Source, error) {
			if r.Header.Get("Authorization") == "Basic forge" {
				r.Header.Set("Authorization", credential)
			}
			return local(ctx, r, name)
		}
	})
	plainForge := httptest.NewServer(forgeServer.Config.Handler) // git trusts no test CA
	defer plainForge.Close()
	for name, clone := range map[string]forge.Clone{
		"local": {Dir: o.dir},
		"forge": {URL: plainForge.URL + strings.TrimPrefix(forgeBase, forgeServer.URL), Header: map[string]string{"Authorization": "Basic forge"}},
	} {
		t.Run(name, func(t *testing.T) {
			temp := t.TempDir()
			server, base, _ := serve(t, o.git, Source{Clone: clone, Commit: o.tip}, func(c *Config) { c.TempDir = temp })
			resp := get(t, server, base+".tar", nil)
			if resp.StatusCode != http.StatusOK {
				t.Fatal(resp.Status, read(t, resp))
			}
			got := map[string]string{}
			for r := tar.NewReader(resp.Body); ; {
				h, err := r.Next()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				content, err := io.ReadAll(r)
				if err != nil {
					t.Fatal(err)
				}
				got[h.Name] = fmt.Sprintf("%c %o %s%s%s", h.Typeflag, h.Mode, h.Linkname, content, h.PAXRecords["comment"])
			}
			want := map[string]string{
				"pax_global_header": "g 0 " + o.tip, "README": "0 644 $Format:%H$\n", "run.sh": "0 755 #!/bin/sh\n",
				"sub/dir/file with space": "0 644 x", "skipped": "0 644 kept in the tar\n", "link": "2 777 README", "m/": "5 755 ",
			}
			for name, content := range want {
				if got[name] != content {
					t.Errorf("%s: %q, want %q", name, got[name], content)
				}
			}
			if len(got) != len(want)+2 { // .gitattributes, .gitmodules
				t.Errorf("%d entries: %v", len(got), got)
			}
			server.Close() // waits for the handler's end
			if left, err := os.ReadDir(temp); err != nil || len(left) != 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
	if _, err := os.Stat(marker); !errors.Is(err, os.ErrNotExist) {
		t.Error("a smudge filter ran")
	}
	absent := Source{Clone: forge.Clone{Dir: o.dir}, Commit: strings.Repeat("a", 40)}
	server, base, _ := serve(t, o.git, absent, nil)
	if resp := get(t, server, base+".tar", nil); resp.StatusCode != http.StatusNotFound {
		t.Errorf("absent commit: %s", resp.Status)
	}
}

// deniedPaths are refused before anyone is asked for authority.
var deniedPaths = []string{
	"/", "/git", "/git/", "/git/a", "/git/a/", "/git//info/refs?service=git-upload-pack", "/git/a/HEAD", "/git/a/objects/info/packs",
	"/git/a/info/refs", "/git/a/info/refs?service=git-receive-pack", "/git/a/info/refs?service=git-upload-pack&x=1",
	"/git/a/info/refs?x=1&service=git-upload-pack", "/git/a/info/refs?service=git%2dupload-pack", "/git/a/info/refs/?service=git-upload-pack",
	"/git/a;x/info/refs?service=git-upload-pack", "/git/a/info/refs;x?service=git-upload-pack", "//git/a/info/refs?service=git-upload-pack",
	"/git//a/info/refs?service=git-upload-pack", "/git/a//info/refs?service=git-upload-pack", "/git/a/./info/refs?service=git-upload-pack",
	"/git/b/../a/info/refs?service=git-upload-pack", "/git/%2e%2e/info/refs?service=git-upload-pack", "/git/../info/refs?service=git-upload-pack",
	"/git/a%2finfo/refs?service=git-upload-pack", "/git/%61/info/refs?service=git-upload-pack", "/git/a/info%2frefs?service=git-upload-pack",
	"/GIT/a/info/refs?service=git-upload-pack", "/git/a/git-upload-pack", "/git/a/git-receive-pack", "/git/a.tar?x", "/git/a.tar/", "/git/.tar",
	"/git/a/b.tar", "/git/a.tar.gz", "/git/a%00.tar", "/git/a.b.tar", "/git/" + strings.Repeat("a", 65) + ".tar", "/x/git/a.tar", "/git/ä.tar",
	"/git/a b.tar", `/git/a\b.tar`, "/git/a/../../etc/passwd.tar",
}

func TestRoute(t *testing.T) {
	for _, path := range deniedPaths {
		u, err := url.ParseRequestURI(path)
		if err != nil {
			continue // net/http refuses it
		}
		if name, a := route(http.MethodGet, u); a != deny {
			t.Errorf("GET %s: %v for %q", path, a, name)
		}
	}
	for _, method := range []string{"HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", ""} {
		for _, path := range []string{"/git/a.tar", "/git/a/info/refs?service=git-upload-pack", "/git/a/git-upload-pack"} {
			u, _ := url.ParseRequestURI(path)
			if _, a := route(method, u); a != deny {
				t.Errorf("%s %s: %v", method, path, a)
			}
		}
	}
	for _, path := range []string{"/git/a/git-receive-pack", "/git/a/info/refs?service=git-upload-pack", "/git/a.tar", "/git/a/git-upload-pack?x"} {
		u, _ := url.ParseRequestURI(path)
		if _, a := route(http.MethodPost, u); a != deny {
			t.Errorf("POST %s: %v", path, a)
		}
	}
}

func FuzzRoute(f *testing.F) {
	for _, path := range deniedPaths {
		f.Add("GET", path)
	}
	f.Add("GET", "/git/a.tar")
	f.Add("POST", "/git/a/git-upload-pack")
	f.Fuzz(func(t *testing.T, method, path string) {
		u, err := url.ParseRequestURI(path)
		if err != nil {
			return
		}
		name, a := route(method, u)
		want := map[action]string{
			archive: "GET /git/" + name + ".tar", upload: "POST /git/" + name + "/git-upload-pack",
			advertise: "GET /git/" + name + "/info/refs?service=git-upload-pack",
		}
		if a == deny {
			if name != "" {
				t.Errorf("denied, yet names %q", name)
			}
			return
		}
		if u.Scheme != "" { // an absolute form names the same
			path = u.RequestURI()
		}
		if strings.TrimSuffix(method+" "+path, "?") != want[a] || strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" || name == "" {
			t.Errorf("%s %q is served as %q", method, path, want[a])
		}
	})
}

func TestRefusals(t *testing.T) {
	o := newOrigin(t)
	asked := 0
	server, base, _ := serve(t, o.git, Source{Clone: forge.Clone{Dir: o.dir}, Commit: o.tip}, func(c *Config) {
		authorize := c.Authorize
		c.Authorize = func(ctx context.Context, r *http.Request, name string) (Source, error) {
			asked++
			return authorize(ctx, r, name)
		}
		c.MaxRequestBytes = 1 << 10
	})
	for _, path := range []string{"/git/" + attempt + "/HEAD", "/git/" + attempt + "/info/refs", "/git/" + attempt + "/info/refs?service=git-receive-pack"} {
		if resp := get(t, server, server.URL+path, nil); resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s", path, resp.Status)
		}
	}
	if asked != 0 {
		t.Error("authority was asked for a request that is never served")
	}
	for name, url := range map[string]string{"credential": base, "attempt": server.URL + "/git/other"} {
		resp := get(t, server, url+".tar", func(r *http.Request) {
			if name == "credential" {
				r.Header.Set("Authorization", "Bearer bad")
			}
		})
		if body := read(t, resp); resp.StatusCode != http.StatusNotFound || body != "not found\n" {
			t.Errorf("%s: %d %q", name, resp.StatusCode, body)
		}
	}
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	if _, err := z.Write(bytes.Repeat([]byte("0032want "+o.tip+"\n"), 10_000)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		contentType, encoding string
		body                  []byte
		want                  int
	}{
		"content type": {"text/plain", "", []byte("0000"), 404},
		"encoding":     {requestType, "br", []byte("0000"), 404},
		"not gzip":     {requestType, "gzip", []byte("0000"), 404},
		"too large":    {requestType, "", bytes.Repeat([]byte("0032want "+o.tip+"\n"), 1000), 404},
		"bomb":         {requestType, "gzip", bomb.Bytes(), 404},
	} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, base+"/git-upload-pack", bytes.NewReader(tc.body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", credential)
		r.Header.Set("Content-Type", tc.contentType)
		if tc.encoding != "" {
			r.Header.Set("Content-Encoding", tc.encoding)
		}
		resp, err := server.Client().Do(r)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if resp.StatusCode != tc.want {
			t.Errorf("%s: %s", name, resp.Status)
		}
		resp.Body.Close()
	}
}

// A guest that goes away in the middle of a transfer ends git, and gives its
// place to the next request.
func TestGuestGoesAway(t *testing.T) {
	o := newOrigin(t)
	noise := make([]byte, 8<<20) // more than fits into sockets and pipes
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise)
	o.write("noise", string(noise), 0o644)
	tip := o.commit("noise")
	server, base, client := serve(t, o.git, Source{Clone: forge.Clone{Dir: o.dir}, Commit: tip}, func(c *Config) { c.MaxConcurrent = 1 })
	want := fmt.Sprintf("0032want %s\n00000009done\n", tip)
	for range 2 {
		ctx, cancel := context.WithCancel(t.Context())
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/git-upload-pack", strings.NewReader(want))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", credential)
		r.Header.Set("Content-Type", requestType)
		resp, err := server.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(resp.Body, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		cancel()
		resp.Body.Close()
		tarResponse := get(t, server, base+".tar", nil) // waits for the place
		if _, err := io.ReadFull(tarResponse.Body, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		tarResponse.Body.Close()
	}
	if err := o.git.Run(t.Context(), client, "ls-remote", "--", base); err != nil {
		t.Error(err)
	}
	server.Close() // goleak finds what a handler left running
}

func TestUnavailable(t *testing.T) {
	git := newOrigin(t).git
	server, base, _ := serve(t, git, Source{}, func(c *Config) {
		c.Authorize = func(context.Context, *http.Request, string) (Source, error) {
			return Source{}, fmt.Errorf("%w: database", ErrUnavailable)
		}
	})
	resp := get(t, server, base+".tar", nil)
	if body := read(t, resp); resp.StatusCode != http.StatusServiceUnavailable || strings.Contains(body, "database") {
		t.Errorf("%d %q", resp.StatusCode, body)
	}
	for name, src := range map[string]Source{
		"nothing": {Commit: strings.Repeat("a", 40)}, "relative": {Clone: forge.Clone{Dir: "-x"}, Commit: strings.Repeat("a", 40)},
		"ext": {Clone: forge.Clone{URL: "ext::sh"}, Commit: strings.Repeat("a", 40)}, "commit": {Clone: forge.Clone{Dir: "/x"}, Commit: "--all"},
	} {
		server, base, _ := serve(t, git, src, nil)
		if resp := get(t, server, base+".tar", nil); resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s", name, resp.Status)
		}
	}
}

// A guest that takes nothing of what it asked for keeps neither the places of
// others nor, for long, its own.
func TestGuestStalls(t *testing.T) {
	o := newOrigin(t)
	noise := make([]byte, 32<<20) // more than fits into sockets and pipes
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise)
	o.write("noise", string(noise), 0o644)
	src := Source{Clone: forge.Clone{Dir: o.dir}, Commit: o.commit("noise")}
	anyone := func(c *Config) {
		c.Authorize = func(context.Context, *http.Request, string) (Source, error) { return src, nil }
	}
	stall := func(t *testing.T, server *httptest.Server, url string) {
		t.Helper()
		transport := server.Client().Transport.(*http.Transport).Clone()
		transport.ForceAttemptHTTP2, transport.TLSNextProto = false, map[string]func(string, *tls.Conn) http.RoundTripper{}
		transport.TLSClientConfig.NextProtos = nil
		t.Cleanup(transport.CloseIdleConnections)
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := (&http.Client{Transport: transport}).Do(r)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		if resp.StatusCode != http.StatusOK || resp.ProtoMajor != 1 {
			t.Fatalf("%s over %s", resp.Status, resp.Proto)
		}
	}
	t.Run("per attempt", func(t *testing.T) {
		server, base, _ := serve(t, o.git, src, func(c *Config) { anyone(c); c.MaxPerAttempt = 1 })
		stall(t, server, base+".tar")
		if resp := get(t, server, base+"/info/refs?service=git-upload-pack", nil); resp.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("one more of the same attempt: %s", resp.Status)
		}
		other := server.URL + "/git/other"
		if resp := get(t, server, other+"/info/refs?service=git-upload-pack", nil); resp.StatusCode != http.StatusOK {
			t.Errorf("another attempt: %s", resp.Status)
		}
	})
	t.Run("place", func(t *testing.T) {
		server, base, _ := serve(t, o.git, src, func(c *Config) { anyone(c); c.MaxConcurrent, c.Stall = 1, 200*time.Millisecond })
		stall(t, server, base+".tar")
		if resp := get(t, server, base+"/info/refs?service=git-upload-pack", nil); resp.StatusCode != http.StatusOK {
			t.Errorf("after one that stalls: %s", resp.Status)
		}
	})
}
