package github_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/github"
	fake "github.com/solstice-ci/solstice-go/internal/fakeforge/github"
)

func secretOf(secret []byte) forge.SecretFunc {
	return func(context.Context, string) ([]byte, error) { return secret, nil }
}

// GitHub sends SHA-1 beside SHA-256: alone it proves nothing.
func TestSHA1AloneIsRefused(t *testing.T) {
	f := start(t, true, nil)
	secret := []byte("secret")
	r := webhook(t, "ping", []byte(`{"zen":"x"}`), secret)
	if r.Header.Get("X-Hub-Signature") == "" {
		t.Fatal("there is no signature by SHA-1")
	}
	r.Header.Del("X-Hub-Signature-256")
	if _, err := f.ParseWebhook(t.Context(), r, secretOf(secret)); !errors.Is(err, forge.ErrSignature) {
		t.Error(err)
	}
	r = webhook(t, "ping", []byte(`{"zen":"x"}`), secret)
	r.Header.Set("X-Hub-Signature-256", r.Header.Get("X-Hub-Signature"))
	if _, err := f.ParseWebhook(t.Context(), r, secretOf(secret)); !errors.Is(err, forge.ErrSignature) {
		t.Error(err)
	}
	r = webhook(t, "ping", []byte(`{"zen":"x"}`), secret)
	r.Header.Add("X-Hub-Signature-256", r.Header.Get("X-Hub-Signature-256")) // which one would count?
	if _, err := f.ParseWebhook(t.Context(), r, secretOf(secret)); !errors.Is(err, forge.ErrSignature) {
		t.Error(err)
	}
}

// A repository that is named twice is not one whose secret was asked for and
// another that the event is of.
func TestRepositoryNamedTwice(t *testing.T) {
	f := start(t, true, nil)
	secret := []byte("secret")
	const good = `{"full_name":"team/mine","id":1}`
	for _, body := range []string{
		`{"repository":` + good + `,"repository":{"full_name":"team/theirs"}}`,
		`{"repository":` + good + `,"Repository":{"full_name":"team/theirs"}}`,
		`{"repository":{"full_name":"team/mine","Full_Name":"team/theirs"}}`,
		`{"repository":` + good + `,"repository":null}`,
	} {
		asked := "nothing"
		e, err := f.ParseWebhook(t.Context(), webhook(t, "ping", []byte(body), secret), func(_ context.Context, repo string) ([]byte, error) {
			asked = repo
			return secret, nil
		})
		if err == nil && e.Repo.FullName() != asked {
			t.Errorf("%s: the secret is that of %q, the event of %q", body, asked, e.Repo.FullName())
		}
	}
}

func fuzzed(f *testing.F) *github.Forge {
	f.Helper()
	key, err := fake.AppKey()
	if err != nil {
		f.Fatal(err)
	}
	driver, err := github.New(github.Config{App: &github.App{ID: fake.AppID, Key: key}})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = driver.Close() })
	return driver
}

// FuzzWebhook: whoever has the secret gets an event that is valid, of the
// repository whose secret it is, or an error.
func FuzzWebhook(f *testing.F) {
	driver, secret := fuzzed(f), []byte("secret")
	for _, d := range deliveries() {
		f.Add(d.Event, d.Body)
	}
	f.Add("installation_repositories", []byte(`{"action":"removed","repositories_removed":[{"id":1,"full_name":"a/b"}]}`))
	f.Fuzz(func(t *testing.T, event string, body []byte) {
		asked := ""
		e, err := driver.ParseWebhook(t.Context(), webhook(t, event, body, secret), func(_ context.Context, repo string) ([]byte, error) {
			asked = repo
			return secret, nil
		})
		switch {
		case err == nil:
			if bad := e.Validate(); bad != nil || e.Repo.FullName() != asked {
				t.Errorf("%v, of %q, the secret is that of %q", bad, e.Repo.FullName(), asked)
			}
		case !errors.Is(err, forge.ErrIgnored) && !errors.Is(err, forge.ErrInvalid):
			t.Error(err)
		}
	})
}

// FuzzSignature: nothing but the signature passes.
func FuzzSignature(f *testing.F) {
	driver, secret, body := fuzzed(f), []byte("secret"), []byte(`{"zen":"x"}`)
	right := webhook(f, "ping", body, secret).Header.Get("X-Hub-Signature-256")
	f.Add(right)
	f.Add(strings.ToUpper(right))
	f.Add("")
	f.Add("sha256=")
	f.Add("sha1=" + right[7:])
	f.Add(right[:len(right)-2])
	f.Fuzz(func(t *testing.T, signature string) {
		r := webhook(t, "ping", body, secret)
		r.Header["X-Hub-Signature-256"] = []string{signature}
		_, err := driver.ParseWebhook(t.Context(), r, secretOf(secret))
		// The digits of hex have no case.
		if is := strings.HasPrefix(signature, "sha256=") && strings.EqualFold(signature, right); (err == nil) != is || err != nil && !errors.Is(err, forge.ErrSignature) {
			t.Errorf("signature %q: %v", signature, err)
		}
	})
}
