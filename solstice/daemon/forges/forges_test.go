package forges

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/remoteforge"
)

// written gives the file of a text, with other files beside it.
func written(t *testing.T, text string, others map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "forges.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, content := range others {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return file
}

// TestOpen: forges are opened as the file says, paths are relative to it, and who
// may start what goes with them.
func TestOpen(t *testing.T) {
	file := written(t, `
forges:
  codeberg:
    driver: forgejo
    url: https://codeberg.org
    token_file: token
    webhook_secret_file: secret
    allow: [acme, other/widget]
    poll: 10m
  hub:
    driver: github
    token_file: token
    owned_elsewhere: true
  lab: { driver: gitlab, url: 'https://gitlab.example.org/path', token_file: token, webhook_secret_file: secret, allow_all: true, poll: off }
  here: { driver: local, root: repos, serve: 'unix:here.sock' }
`, map[string]string{"token": "t0k3n\n", "secret": "s3cret\r\n"})
	if err := os.Mkdir(filepath.Join(filepath.Dir(file), "repos"), 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	state := t.TempDir()
	s, err := f.Open(t.Context(), Options{StateDir: state})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	if got := s.Forges(); len(got) != 4 || got["codeberg"] == nil || got["here"] == nil {
		t.Errorf("forges %v", got)
	}
	if got := s.OwnedElsewhere(); len(got) != 1 || got[0] != "hub" {
		t.Errorf("owned elsewhere: %v", got)
	}
	all := s.All()
	if len(all) != 4 || all[0].URL != "https://codeberg.org" || all[1].Serve != "unix:"+filepath.Join(filepath.Dir(file), "here.sock") {
		t.Errorf("all: %+v", all)
	}
	in := s.Instances()
	if len(in) != 2 || len(in["codeberg"].Allow) != 2 || !in["lab"].AllowAll {
		t.Errorf("instances %v", in)
	}
	if in["codeberg"].Poll != 10*time.Minute || in["lab"].Poll >= 0 {
		t.Errorf("polled every %s and %s", in["codeberg"].Poll, in["lab"].Poll)
	}
	if secret, err := in["codeberg"].Secret(t.Context(), "acme/widget"); err != nil || string(secret) != "s3cret" {
		t.Errorf("secret %q, %v", secret, err)
	}
	if _, err := s.Forges()["here"].Resolve(t.Context(), forge.Repo{Name: "none"}, "HEAD"); !errors.Is(err, forge.ErrNotFound) {
		t.Errorf("a repository that is not there: %v", err)
	}
}

// TestPlugin: a plugin that is there is a forge.
func TestPlugin(t *testing.T) {
	local, err := (&entry{name: "l", file: "/x", Driver: "local", Root: t.TempDir()}).open(t.Context(), Options{StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = local.Close() })
	dir, err := os.MkdirTemp("", "f") // a socket's name is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	at := "unix:" + filepath.Join(dir, "s")
	done := make(chan error, 1)
	go func() {
		done <- remoteforge.Serve(t.Context(), at, remoteforge.NewServer(local, remoteforge.ServerOptions{}), nil)
	}()
	f, err := ReadFile(written(t, "forges: { p: { driver: 'grpc+"+at+"' } }", nil))
	if err != nil {
		t.Fatal(err)
	}
	s, err := f.Open(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if !s.Forges()["p"].Capabilities().Statuses {
		t.Error("it is not the plugin's forge")
	}
	if len(s.Instances()) != 0 {
		t.Error("a plugin without webhooks takes some")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestWrongFile: what is wrong is said with its place, all of it.
func TestWrongFile(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want []string
	}{
		"empty":         {"", []string{"no documents"}},
		"none":          {"forges: {}", []string{"there are no forges"}},
		"unknown key":   {"forges:\n  a: { driver: local, rot: x }", []string{"line 2: unknown key rot"}},
		"twice":         {"forges:\n  a: {}\n  a: {}", []string{`line 3: mapping key "a"`}},
		"driver":        {"forges: { A: { driver: svn } }", []string{"forge A: a name is", `driver "svn"`}},
		"foreign keys":  {"forges: { a: { driver: local, root: x, url: 'https://x', app_id: 1 } }", []string{"url is none of driver local", "app_id is none of"}},
		"half an App":   {"forges: { a: { driver: github, app_id: 1 } }", []string{"app_id and app_key_file go together"}},
		"App and token": {"forges: { a: { driver: github, app_id: 1, app_key_file: k, token_file: t } }", []string{"an App (app_id and app_key_file) or a token"}},
		"no login":      {"forges: { a: { driver: github } }", []string{"an App (app_id and app_key_file) or a token"}},
		"no URL":        {"forges: { a: { driver: gitlab } }", []string{"url is missing", "token_file is missing"}},
		"URL":           {"forges: { a: { driver: gitea, url: 'https://u:p@x', token_file: t } }", []string{"without credentials"}},
		"allow":         {"forges: { a: { driver: local, root: x, allow: ['acme/*'], allow_all: true } }", []string{`allow "acme/*"`, "exclude each other"}},
		"poll":          {"forges: { a: { driver: local, root: x, poll: 1m }, b: { driver: 'grpc+unix:x', poll: often }, c: { driver: 'grpc+unix:x', poll: 9ms } }", []string{"poll is none of driver local", `poll "often"`, `poll "9ms"`}},
		"owned":         {"forges: { a: { driver: 'grpc+unix:x', owned_elsewhere: true, allow: [acme] } }", []string{"allow, allow_all and serve are the owner's"}},
		"served":        {"forges: { a: { driver: local, root: x, serve: 'x' }, b: { driver: local, root: x, serve: 'unix:y' }, c: { driver: local, root: x, serve: 'unix:y' } }", []string{`serve "x"`, "forge c: b is served at unix:y already"}},
		"no root":       {"forges: { a: { driver: local } }", []string{"root is missing"}},
		"plugin":        {"forges: { a: { driver: command }, b: { driver: 'grpc+tls:x:1', plugin: { tls_ca: a, env: [X] } } }", []string{"go together", "needs all three", "plugin.env"}},
	} {
		_, err := ReadFile(written(t, c.text, nil))
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v lacks %q", name, err, want)
			}
		}
	}
	f, err := ReadFile(written(t, "forges: { a: { driver: github, token_file: empty } }", map[string]string{"empty": "\n"}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Open(t.Context(), Options{}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "empty is empty") {
		t.Errorf("an empty token: %v", err)
	}
	if _, err := ReadFile(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}
