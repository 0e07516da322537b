package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgetest"
	"github.com/solstice-ci/solstice-go/forge/remoteforge"
)

var _ = flag.Bool("update", false, "write testdata/*.json from what the forge gives")

// TestConformance runs the suite on the forge itself.
func TestConformance(t *testing.T) {
	t.Parallel()
	forgetest.Run(t, forgetest.Harness{New: func(tb forgetest.TB) forgetest.Fixture {
		fixture := over(tb.TempDir())
		f, err := Open(fixture.root)
		if err != nil {
			tb.Fatalf("%v", err)
		}
		return fixture.with(tb, f)
	}})
}

// TestConformanceAsPlugin runs the same on a plugin that the suite's side starts. It
// has the webhooks' secret itself.
func TestConformanceAsPlugin(t *testing.T) {
	t.Parallel()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	forgetest.Run(t, forgetest.Harness{New: func(tb forgetest.TB) forgetest.Fixture {
		fixture := over(tb.TempDir())
		app := repository{name: "team/app", dir: fixture.git(forge.Repo{Owner: "team", Name: "app"}).Dir}
		forgetest.Git{Dir: app.dir}.Init(tb)
		if err := os.MkdirAll(app.own(), 0o755); err != nil {
			tb.Fatalf("%v", err)
		}
		if err := os.WriteFile(app.own("secret"), []byte("the secret of team/app\n"), 0o600); err != nil {
			tb.Fatalf("%v", err)
		}
		f, err := remoteforge.Start(tb.Context(), remoteforge.Command{Argv: []string{exe, asPlugin, "serve", "--root", fixture.root}})
		if err != nil {
			tb.Fatalf("%v", err)
		}
		out := fixture.with(tb, f)
		out.Webhooks.Secret = []byte("the secret of team/app")
		return out
	}})
}

// fixture fills a directory of repositories behind the forge's back.
type fixture struct{ root string }

func over(root string) fixture { return fixture{root} }

func (x fixture) git(r forge.Repo) forgetest.Git {
	return forgetest.Git{Dir: filepath.Join(x.root, filepath.FromSlash(r.FullName())+".git")}
}

// with is what the suite needs, for a forge that serves the directory.
func (x fixture) with(tb forgetest.TB, f forge.Forge) forgetest.Fixture {
	people, err := Open(x.root)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	return forgetest.Fixture{
		Forge: f,
		Repo: func(tb forgetest.TB, name string) forge.Repo {
			r := forge.Repo{Owner: "team", Name: name}
			x.git(r).Init(tb)
			hook := filepath.Join(x.git(r).Dir, "hooks", "post-receive")
			if err := os.WriteFile(hook, []byte("exec bareforge hook --url 'http://localhost/webhook'\n"), 0o600); err != nil {
				tb.Fatalf("%v", err)
			}
			return r
		},
		Commit: func(tb forgetest.TB, r forge.Repo, branch string, files map[string]forgetest.File) string {
			return x.git(r).Commit(tb, branch, files)
		},
		Tag: func(tb forgetest.TB, r forge.Repo, name, commit string, annotated bool) {
			x.git(r).Tag(tb, name, commit, annotated)
		},
		Fetch: func(tb forgetest.TB, c forge.Clone, commit, path string) (string, error) {
			clone := forgetest.Git{Dir: filepath.Join(tb.TempDir(), "clone.git")}
			clone.Init(tb)
			clone.Run(tb, "", "fetch", "-q", "--depth=1", "file://"+c.Dir, commit)
			return clone.Run(tb, "", "cat-file", "blob", commit+":"+path), nil
		},
		Statuses: func(tb forgetest.TB, r forge.Repo, commit string) []forge.Status {
			all, err := people.Statuses(tb.Context(), r, commit)
			if err != nil {
				tb.Errorf("Statuses: %v", err)
			}
			return all
		},
		Webhooks:   &forgetest.Webhooks{Request: request, Deliveries: deliveries(tb)},
		WebhookURL: "http://localhost/webhook",
		User: func(tb forgetest.TB, r forge.Repo, mayApprove bool) forge.User {
			repo := repository{name: r.FullName(), dir: x.git(r).Dir}
			if !mayApprove {
				return forge.User{ID: "1002", Login: "eve"}
			}
			if err := os.MkdirAll(repo.own(), 0o755); err != nil {
				tb.Fatalf("%v", err)
			}
			if err := os.WriteFile(repo.own("approvers"), []byte("1000\n1001\n"), 0o644); err != nil {
				tb.Fatalf("%v", err)
			}
			return forge.User{ID: "1001", Login: "alice"}
		},
	}
}

// request is a webhook as post sends it.
func request(tb forgetest.TB, _ string, body, secret []byte) *http.Request {
	r, err := http.NewRequestWithContext(tb.Context(), http.MethodPost, "http://localhost/", strings.NewReader(string(body)))
	if err != nil {
		tb.Fatalf("%v", err)
	}
	r.Header.Set(signatureHeader, sign(body, secret))
	return r
}

// deliveries are the files of testdata/webhooks, and what is wrong with them.
func deliveries(tb forgetest.TB) []forgetest.Delivery {
	var all []forgetest.Delivery
	becomes := map[string]error{
		"push": nil, "new-branch": nil, "tag": nil, "ping": nil,
		"deleted-branch": forge.ErrIgnored, "note": forge.ErrIgnored, "unknown": forge.ErrIgnored, "tag-of-a-file": forge.ErrIgnored,
		"no-commit": forge.ErrInvalid, "short-commit": forge.ErrInvalid,
	}
	for _, name := range slices.Sorted(maps.Keys(becomes)) {
		err := becomes[name]
		body, rerr := os.ReadFile(filepath.Join("testdata", "webhooks", name+".json"))
		if rerr != nil {
			tb.Fatalf("%v", rerr)
		}
		d := forgetest.Delivery{Name: name, Event: "update", Body: body, Repo: "team/app", Err: err}
		if err == nil {
			d.Golden = filepath.Join("testdata", "events", name+".json")
		}
		all = append(all, d)
	}
	return append(all, forgetest.Delivery{Name: "malformed", Event: "update", Body: []byte(`{"repo":"team/`), Err: forge.ErrInvalid})
}

// FuzzParseWebhook: whatever has been signed becomes a valid event or an error.
func FuzzParseWebhook(f *testing.F) {
	names, err := filepath.Glob(filepath.Join("testdata", "webhooks", "*.json"))
	if err != nil || len(names) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, name := range names {
		body, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(body, sign(body, []byte("secret")))
	}
	d, err := Open(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, body []byte, signature string) {
		secret := []byte("secret")
		r := request(t, "", body, secret)
		r.Header.Set(signatureHeader, signature)
		secrets := func(context.Context, string) ([]byte, error) { return secret, nil }
		e, err := d.ParseWebhook(t.Context(), r, secrets)
		if err == nil && (signature != sign(body, secret) || e.Validate() != nil) {
			b, err := json.Marshal(e)
			t.Errorf("signed %q it became %s, %v", signature, b, errorOr(err, e.Validate()))
		}
	})
}

func errorOr(errs ...error) string { return fmt.Sprint(errs) }
