package gitserve

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
)

// What the protocol needs of a guest's and a forge's headers.
var (
	requestHeaders  = []string{"Accept", "Accept-Encoding", "Content-Encoding", "Content-Type", "Git-Protocol"}
	responseHeaders = []string{"Content-Encoding", "Content-Length"}
)

// proxy passes one of git's two requests on to the forge, with its credentials.
func (h *Handler) proxy(ctx context.Context, w *response, r *http.Request, a action, c forge.Clone) error {
	url, want := strings.TrimSuffix(c.URL, "/"), resultType
	var body io.Reader
	if a == advertise {
		url, want = url+"/info/refs?"+advertisementsQuery, advertisementType
	} else {
		if t := r.Header.Get("Content-Type"); t != requestType {
			return fmt.Errorf("%w: content type %.80q", errRefused, t)
		}
		url += "/" + uploadPack
		body = http.MaxBytesReader(w.ResponseWriter, r.Body, h.c.MaxRequestBytes)
	}
	req, err := http.NewRequestWithContext(ctx, r.Method, url, body)
	if err != nil {
		return err
	}
	for _, name := range requestHeaders {
		if value := r.Header.Get(name); value != "" && len(value) <= 256 {
			req.Header.Set(name, value)
		}
	}
	if a == upload && r.ContentLength >= 0 {
		req.ContentLength = r.ContentLength
	}
	// Some forges answer to git alone.
	req.Header.Set("User-Agent", "git/"+h.c.Git.Version())
	for name, value := range c.Header {
		req.Header.Set(name, value)
	}
	// The transport and not a client: redirects are an answer like any other.
	resp, err := h.c.Transport.RoundTrip(req)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%w: %w", forge.ErrUnavailable, err)
	}
	defer resp.Body.Close()
	if err := checkAnswer(resp, want); err != nil {
		return err
	}
	w.head(want)
	for _, name := range responseHeaders {
		if value := resp.Header.Get(name); value != "" {
			w.Header().Set(name, value)
		}
	}
	_, err = io.Copy(w, resp.Body)
	return err
}

func checkAnswer(resp *http.Response, want string) error {
	code := resp.StatusCode
	err := fmt.Errorf("gitserve: the forge answers %s", resp.Status)
	switch {
	case code >= 300 && code < 400:
		return fmt.Errorf("gitserve: the forge redirects to %.200q, which is not followed: correct the clone URL", resp.Header.Get("Location"))
	case code == http.StatusNotFound || code == http.StatusGone:
		return fmt.Errorf("%w: %w", forge.ErrNotFound, err)
	case code == http.StatusUnauthorized || code == http.StatusForbidden:
		return fmt.Errorf("%w: %w", forge.ErrPermission, err)
	case code == http.StatusTooManyRequests || code >= 500:
		return fmt.Errorf("%w: %w", forge.ErrUnavailable, err)
	case code != http.StatusOK:
		return err
	}
	if got := resp.Header.Get("Content-Type"); got != want {
		return fmt.Errorf("gitserve: the forge answers with content type %.80q, not %s", got, want)
	}
	return nil
}

// archiveURL fetches the one commit, then serves its tree.
func (h *Handler) archiveURL(ctx context.Context, w *response, src Source) (err error) {
	tmp, err := os.MkdirTemp(h.c.TempDir, "solstice-git-")
	if err != nil {
		return fmt.Errorf("gitserve: %w", err)
	}
	defer os.RemoveAll(tmp)
	dir := filepath.Join(tmp, "repo.git")
	if _, err := localgit.Mirror(ctx, src.Clone.URL, dir, localgit.MirrorOptions{
		Ref: src.Commit, Depth: 1, Schemes: []string{"https", "http"}, Header: src.Clone.Header, Git: h.c.Git.Path(),
	}); err != nil {
		return err
	}
	return h.archive(ctx, w, dir, src.Commit)
}
