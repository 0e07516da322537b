package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/solstice-ci/solstice-go/forge"
)

// A status is the file bareforge/statuses/COMMIT/HASH-OF-KEY in its repository. Keys
// are any text, so that none can be a file's name.

// ReportStatus implements forge.Forge.
func (f *Forge) ReportStatus(ctx context.Context, r forge.Repo, commit string, s forge.Status) error {
	if err := s.Validate(); err != nil {
		return err
	}
	repo, err := f.at(ctx, r, commit)
	if err != nil {
		return err
	}
	if err := report(repo, commit, s); err != nil {
		return fmt.Errorf("report status: %w", err)
	}
	return nil
}

func report(repo repository, commit string, s forge.Status) error {
	dir := repo.own("statuses", commit)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// One at a time, also among processes: two reports read the same version and
	// the lower one might be written last.
	lock, err := os.OpenFile(repo.own("lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close() // which unlocks
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return err
	}
	name := filepath.Join(dir, fmt.Sprintf("%x.json", sha256.Sum256([]byte(s.Key))))
	if last, err := read(name); err == nil && last.Version >= s.Version {
		return nil
	}
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	file, err := os.Create(name + ".new")
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		return err
	}
	return os.Rename(name+".new", name) // there is never half a one
}

func read(name string) (s forge.Status, err error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(data, &s)
}

// Statuses gives what stands beside a commit, sorted by key, for people.
func (f *Forge) Statuses(ctx context.Context, r forge.Repo, commit string) ([]forge.Status, error) {
	repo, err := f.at(ctx, r, commit)
	if err != nil {
		return nil, err
	}
	names, err := filepath.Glob(repo.own("statuses", commit, "*.json"))
	if err != nil {
		return nil, err
	}
	var all []forge.Status
	for _, name := range names {
		s, err := read(name)
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b forge.Status) int { return strings.Compare(a.Key, b.Key) })
	return all, nil
}

// ForgetStatuses implements forge.StatusForgetter.
func (f *Forge) ForgetStatuses(ctx context.Context, r forge.Repo, commit string) error {
	if !forge.IsCommit(commit) {
		return fmt.Errorf("%w: commit %.80q", forge.ErrInvalid, commit)
	}
	repo, err := f.open(ctx, r)
	if errors.Is(err, forge.ErrNotFound) { // with its statuses
		return nil
	}
	if err != nil {
		return err
	}
	return os.RemoveAll(repo.own("statuses", commit))
}
