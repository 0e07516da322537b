package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
)

// postTimeout bounds one webhook: whoever pushes waits for it.
const postTimeout = 10 * time.Second

// create makes a repository whose hook posts to url, with a secret of its own.
func (f *Forge) create(ctx context.Context, name, url, program string) error {
	if err := repoOf(name).Validate(); err != nil {
		return err
	}
	repo := repository{name: name, dir: filepath.Join(f.root, filepath.FromSlash(name)+".git")}
	if _, err := os.Lstat(repo.dir); err == nil {
		return fmt.Errorf("%w: %s is there already", forge.ErrInvalid, repo.dir)
	}
	if err := os.MkdirAll(repo.dir, 0o755); err != nil {
		return err
	}
	if _, err := repo.git(ctx, "init", "--quiet", "--bare", "--initial-branch=main"); err != nil {
		return err
	}
	script := fmt.Sprintf("#!/bin/sh\nexec %s hook --root %s --url %s\n", quote(program), quote(f.root), quote(url))
	return errors.Join(
		os.MkdirAll(repo.own(), 0o755),
		os.WriteFile(repo.own("secret"), []byte(rand.Text()+"\n"), 0o600),
		os.MkdirAll(filepath.Join(repo.dir, "hooks"), 0o755),
		os.WriteFile(filepath.Join(repo.dir, "hooks", "post-receive"), []byte(script), 0o755), //nolint:gosec // a program
	)
}

// quote is for sh.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// hook is the post-receive hook of the repository at dir: each line of updates is
// "BEFORE AFTER REF" (see githooks(5)).
func (f *Forge) hook(ctx context.Context, dir, url string, updates io.Reader) error {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	name, err := filepath.Rel(f.root, dir)
	if err != nil {
		return err
	}
	repo := repository{name: strings.TrimSuffix(filepath.ToSlash(name), ".git"), dir: dir}
	secret, err := f.Secret(ctx, repo.name)
	if err != nil {
		return err
	}
	var failed []error
	for lines := bufio.NewScanner(updates); lines.Scan(); {
		fields := strings.SplitN(lines.Text(), " ", 3)
		if len(fields) != 3 {
			continue
		}
		w := webhook{Event: "update", Repo: repo.name, Before: fields[0], After: fields[1], Ref: fields[2]}
		if w.Commit, err = repo.commit(ctx, w.After); err == nil {
			message, err := repo.git(ctx, "log", "-1", "--format=%B", w.Commit)
			failed = append(failed, err)
			w.Message = strings.ToValidUTF8(string(message[:min(len(message), 4<<10)]), "\uFFFD")
		}
		failed = append(failed, post(ctx, url, w, secret))
	}
	return errors.Join(failed...)
}

// post sends a webhook.
func post(ctx context.Context, url string, w webhook, secret []byte) error {
	w.Delivery, w.Time, w.UserID = rand.Text(), time.Now().UTC(), strconv.Itoa(os.Getuid())
	if u, err := user.LookupId(w.UserID); err == nil {
		w.User = u.Username
	}
	body, err := json.Marshal(w)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, postTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set(signatureHeader, sign(body, secret))
	client := http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true}, // no proxy from the environment
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	answer, err := client.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode/100 != 2 {
		return fmt.Errorf("%s of %s: %s", w.Ref, w.Repo, answer.Status)
	}
	return nil
}
