package main

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

// source is what is to be run, in a repository that nobody changes meanwhile.
type source struct {
	name, commit, ref, url string
}

// place is for people.
func (s source) place() string {
	if s.ref == "" {
		return "a detached commit"
	}
	return plain(s.ref)
}

func (c *runCmd) source(ctx context.Context, dest string) (source, error) {
	if c.Repo != "" {
		m, err := localgit.Mirror(ctx, c.Repo, dest, localgit.MirrorOptions{
			Ref: c.Ref, Schemes: []string{"https", "http", "ssh", "git", "file"}, Env: transportEnv(),
		})
		if err != nil {
			return source{}, problem("cannot fetch "+c.Repo, err, fetchAdvice(err))
		}
		name := strings.TrimSuffix(filepath.Base(strings.TrimRight(c.Repo, "/")), ".git")
		return source{name: name, commit: m.Commit, ref: m.Ref, url: c.Repo}, nil
	}
	s, err := localgit.Snapshot(ctx, localgit.SnapshotOptions{
		WorkTree: c.Dir, Dest: dest, Dirty: c.Dirty, ExcludesFile: c.excludesFile(ctx),
	})
	switch {
	case errors.Is(err, localgit.ErrNoCommits):
		return source{}, problem("there is nothing to run yet", err, "commit the workflow, or use --dirty, which runs what is not committed")
	case errors.Is(err, forge.ErrInvalid):
		return source{}, problem("cannot copy the repository", err, "--dirty needs a work tree, and --state-dir or TMPDIR must be outside of it")
	case err != nil:
		return source{}, problem("cannot read the repository", err, "run this in a git repository, or give --repo URL")
	}
	src := source{name: s.Name, commit: s.Commit, ref: s.Ref, url: s.Origin}
	if c.Ref == "" {
		return src, nil
	}
	if src.commit, src.ref, err = c.find(ctx, forge.Repo{Name: s.Name}); err != nil {
		return source{}, problem("cannot find "+c.Ref, err, "give a branch, a tag or a commit of this repository")
	}
	return src, nil
}

func fetchAdvice(err error) string {
	switch {
	case errors.Is(err, forge.ErrInvalid):
		return "give a URL of https, ssh, http, git or file, or an absolute path"
	case errors.Is(err, forge.ErrNotFound):
		return "give a --ref that the repository has: a branch, a tag, a full ref such as refs/pull/1/head, or a whole commit id"
	}
	return "check the URL, and that you may read it"
}

// find looks --ref up in the user's repository; ref is empty for a commit.
func (c *runCmd) find(ctx context.Context, in forge.Repo) (commit, ref string, err error) {
	repo, err := localgit.Open(ctx, localgit.Config{Dir: c.Dir})
	if err != nil {
		return "", "", err
	}
	defer func() { _ = repo.Close() }() // only read from
	heads, err := repo.Heads(ctx, in)
	if err != nil {
		return "", "", err
	}
	if commit, err = repo.Resolve(ctx, in, c.Ref); err != nil {
		return "", "", err
	}
	for _, full := range []string{c.Ref, "refs/heads/" + c.Ref, "refs/tags/" + c.Ref} {
		if heads[full] == commit {
			ref = full
		}
	}
	return commit, ref, nil
}

// excludesFile is the user's own ignore file, as gitignore(5) finds it.
func (c *runCmd) excludesFile(ctx context.Context) string {
	if !c.Dirty {
		return ""
	}
	home := daemon.Environment("HOME", "XDG_CONFIG_HOME")
	cmd := exec.CommandContext(ctx, "git", "config", "--global", "--type=path", "--get", "core.excludesFile")
	cmd.Env = []string{} // nil would inherit everything
	for k, v := range home {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	if out, err := cmd.Output(); err == nil && len(home) > 0 {
		return strings.TrimSuffix(string(out), "\n")
	}
	config := home["XDG_CONFIG_HOME"]
	if config == "" && home["HOME"] != "" {
		config = filepath.Join(home["HOME"], ".config")
	}
	if config == "" {
		return ""
	}
	return filepath.Join(config, "git", "ignore")
}

// transportEnv is what git needs of the caller's environment to fetch a URL.
func transportEnv() []string {
	var out []string
	for k, v := range daemon.Environment("SSH_AUTH_SOCK", "HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy") {
		out = append(out, k+"="+v)
	}
	return out
}
