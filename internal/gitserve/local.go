package gitserve

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"

	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// protocol reads the Git-Protocol header: git gets the version alone, and only
// one that exists.
func protocol(r *http.Request) string {
	header := r.Header.Get("Git-Protocol")
	if len(header) > 256 {
		return ""
	}
	for field := range strings.SplitSeq(header, ":") {
		if field == "version=1" || field == "version=2" {
			return field
		}
	}
	return ""
}

// uploadPack serves a repository on this machine, as git-http-backend(1) does.
func (h *Handler) uploadPack(ctx context.Context, w *response, r *http.Request, a action, dir string) error {
	o := gitcmd.Options{
		SafeDirectory: "*",
		// Full object names are what jobs are given; a branch may be gone by then.
		Config: []string{"uploadpack.allowAnySHA1InWant=true", "uploadpack.allowFilter=true"},
		Stdout: w,
	}
	version := protocol(r)
	if version != "" {
		o.Env = []string{"GIT_PROTOCOL=" + version}
	}
	args := []string{"upload-pack", "--stateless-rpc"}
	var read *watchedBody
	if a == advertise {
		w.head(advertisementType)
		// Version 2 begins with its own capabilities.
		if version != "version=2" {
			o.Stdout = &prefixed{w: w, prefix: "001e# service=git-upload-pack\n0000"}
		}
		args = append(args, "--advertise-refs")
	} else {
		body, err := h.requestBody(w, r)
		if err != nil {
			return err
		}
		defer body.Close()
		w.head(resultType)
		read = &watchedBody{Reader: body}
		o.Stdin = read
	}
	err := h.c.Git.Run(ctx, o, append(args, "--", dir)...)
	if read != nil && read.failed.Load() {
		return fmt.Errorf("%w: body is damaged or over %d bytes: %w", errRefused, h.c.MaxRequestBytes, err)
	}
	if _, exited := gitcmd.ExitCode(err); exited && w.begun {
		// git has told the guest in its own protocol.
		h.c.Logger.WarnContext(ctx, "git upload-pack failed", "error", err)
		return nil
	}
	return err
}

// watchedBody remembers that reading failed, where git only sees an end.
type watchedBody struct {
	io.Reader
	failed atomic.Bool
}

func (b *watchedBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err != nil && err != io.EOF {
		b.failed.Store(true)
	}
	return n, err
}

// prefixed writes a prefix before the first byte.
type prefixed struct {
	w      io.Writer
	prefix string
}

func (p *prefixed) Write(b []byte) (int, error) {
	if p.prefix != "" {
		if _, err := io.WriteString(p.w, p.prefix); err != nil {
			return 0, err
		}
		p.prefix = ""
	}
	return p.w.Write(b)
}

// requestBody gives the body unpacked and bounded.
func (h *Handler) requestBody(w *response, r *http.Request) (io.ReadCloser, error) {
	if t := r.Header.Get("Content-Type"); t != requestType {
		return nil, fmt.Errorf("%w: content type %.80q", errRefused, t)
	}
	// git may answer before it has read everything.
	if err := http.NewResponseController(w.ResponseWriter).EnableFullDuplex(); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return nil, err
	}
	body := http.MaxBytesReader(w.ResponseWriter, r.Body, h.c.MaxRequestBytes)
	switch encoding := r.Header.Get("Content-Encoding"); encoding {
	case "", "identity":
		return body, nil
	case "gzip", "x-gzip":
		unpacked, err := gzip.NewReader(body)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errRefused, err)
		}
		return http.MaxBytesReader(nil, unpacked, h.c.MaxRequestBytes), nil
	default:
		return nil, fmt.Errorf("%w: content encoding %.80q", errRefused, encoding)
	}
}
