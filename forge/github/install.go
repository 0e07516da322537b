package github

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	gh "github.com/google/go-github/v88/github"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// minValid is how long a token has to live for it to be handed out once more:
// longer than a request, and than most clones.
const minValid = 10 * time.Minute

// token is one of an installation.
type token struct {
	text    string
	expires time.Time
}

func (t token) fresh() bool { return time.Until(t.expires) > minValid }

// installation is the App in one account.
type installation struct {
	f      *Forge
	id     int64
	client *gh.Client // as the installation
	lock   chan struct{}
	token  token // under lock
	gone   atomic.Bool
}

// installation finds the App's for a repository.
func (f *Forge) installation(ctx context.Context, r repository) (*installation, error) {
	unlock, err := f.creds.Lock(ctx, r.key())
	if err != nil {
		return nil, err
	}
	defer unlock()
	if i, ok := f.repos.Get(r.key()); ok && !i.gone.Load() {
		return i, nil
	}
	found, _, err := f.asApp.Apps.GetRepositoryInstallation(ctx, r.owner, r.name)
	if err != nil {
		return nil, fail(ctx, err, "find where the App is installed for %s/%s", r.owner, r.name)
	}
	if found.SuspendedAt != nil {
		return nil, fmt.Errorf("%w: github: the App's installation for %s/%s is suspended", forge.ErrPermission, r.owner, r.name)
	}
	i, err := f.installed(ctx, found.GetID())
	if err != nil {
		return nil, err
	}
	f.repos.Put(r.key(), i, 1)
	return i, nil
}

// installed gives the one installation with that ID.
func (f *Forge) installed(ctx context.Context, id int64) (*installation, error) {
	name := strconv.FormatInt(id, 10)
	unlock, err := f.creds.Lock(ctx, name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if i, ok := f.installs.Get(id); ok && !i.gone.Load() {
		return i, nil
	}
	i := &installation{f: f, id: id, lock: make(chan struct{}, 1)}
	if i.client, err = f.client(name, i); err != nil {
		return nil, err
	}
	f.installs.Put(id, i, 1)
	return i, nil
}

// get gives a token, which is not the one that was refused.
func (i *installation) get(ctx context.Context, refused string) (string, error) {
	select {
	case i.lock <- struct{}{}:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	defer func() { <-i.lock }()
	if !i.token.fresh() || i.token.text == refused {
		t, err := i.mint(ctx, &gh.InstallationTokenOptions{})
		if err != nil {
			return "", err
		}
		i.token = t
	}
	return i.token.text, nil
}

// mint asks for a token. An App that is installed anew has another installation,
// which is found at the next call.
func (i *installation) mint(ctx context.Context, o *gh.InstallationTokenOptions) (token, error) {
	t, _, err := i.f.asApp.Apps.CreateInstallationToken(ctx, i.id, o)
	if err == nil && t.GetToken() == "" {
		err = errors.New("the answer has no token")
	}
	if err = fail(ctx, err, "ask for a token of installation %d", i.id); isNotFound(err) {
		i.gone.Store(true)
		return token{}, fmt.Errorf("%w: the App may have been installed anew: %w", forge.ErrUnavailable, err)
	}
	if err != nil {
		return token{}, err
	}
	return token{t.GetToken(), t.GetExpiresAt().Time}, nil
}

// RoundTrip implements http.RoundTripper: as the installation. A token that is
// refused, since somebody revoked it, is replaced once.
func (i *installation) RoundTrip(r *http.Request) (*http.Response, error) {
	refused := ""
	for {
		text, err := i.get(r.Context(), refused)
		if err != nil {
			if r.Body != nil {
				_ = r.Body.Close()
			}
			return nil, err
		}
		resp, err := bearer{text, i.f.base}.RoundTrip(r)
		if err != nil || resp.StatusCode != http.StatusUnauthorized || refused != "" || r.Body != nil && r.GetBody == nil {
			return resp, err
		}
		_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
		_ = resp.Body.Close()
		refused = text
		if r.Body != nil {
			r = r.Clone(r.Context())
			if r.Body, err = r.GetBody(); err != nil {
				return nil, err
			}
		}
	}
}

// CloneInfo implements forge.Forge. With an App the credentials read this
// repository alone; they are shared by those who ask, so nobody revokes them.
func (f *Forge) CloneInfo(ctx context.Context, r forge.Repo, _ forge.CloneOptions) (forge.Clone, error) {
	repo, err := f.open(ctx, r)
	if err != nil {
		return forge.Clone{}, err
	}
	t := token{}
	if f.app == nil {
		if _, _, err := repo.Repositories.Get(ctx, repo.owner, repo.name); err != nil {
			return forge.Clone{}, fail(ctx, err, "look for %s", r.FullName())
		}
		t.text = f.plain
	} else if t, err = f.cloneToken(ctx, repo); err != nil {
		return forge.Clone{}, err
	}
	c := forge.Clone{
		URL:       f.web + "/" + repo.owner + "/" + repo.name + ".git",
		Header:    map[string]string{"Authorization": "Basic " + base64.StdEncoding.EncodeToString([]byte("x-access-token:"+t.text))},
		ExpiresAt: t.expires,
	}
	return c, gitcmd.CheckURL(c.URL, "https", "http")
}

func (f *Forge) cloneToken(ctx context.Context, r repository) (token, error) {
	unlock, err := f.creds.Lock(ctx, "clone "+r.key())
	if err != nil {
		return token{}, err
	}
	defer unlock()
	if t, ok := f.clones.Get(r.key()); ok && t.fresh() {
		return t, nil
	}
	t, err := r.install.mint(ctx, &gh.InstallationTokenOptions{
		Repositories: []string{r.name}, Permissions: &gh.InstallationPermissions{Contents: gh.Ptr("read")},
	})
	if err != nil {
		return token{}, err
	}
	f.clones.Put(r.key(), t, 1)
	return t, nil
}
