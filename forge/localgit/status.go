package localgit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// The statuses of a commit are the lines of the file <commit>.jsonl, of which
// the one with the highest version counts for its key. A report is one write at
// its end: those of several processes need no lock, and in any order converge.

// statuses is the file of a commit's statuses.
func (f *Forge) statuses(repo repository, commit string) string {
	dir := filepath.Join(repo.common, "solstice", "statuses")
	if f.statusDir != "" {
		dir = filepath.Join(f.statusDir, url.PathEscape(repo.id))
	}
	return filepath.Join(dir, commit+".jsonl")
}

// ReportStatus implements forge.Forge.
func (f *Forge) ReportStatus(ctx context.Context, r forge.Repo, commit string, s forge.Status) error {
	if err := s.Validate(); err != nil {
		return err
	}
	repo, _, err := f.commit(ctx, r, commit)
	if err != nil {
		return err
	}
	if err := appendStatus(f.statuses(repo, commit), s); err != nil {
		return fmt.Errorf("localgit: report status: %w", err)
	}
	return nil
}

func appendStatus(name string, s forge.Status) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	const flags = os.O_WRONLY | os.O_CREATE | os.O_APPEND
	file, err := os.OpenFile(name, flags, 0o644)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		file, err = os.OpenFile(name, flags, 0o644)
	}
	if err != nil {
		return err
	}
	st, err := file.Stat()
	if err == nil {
		// With a line break before it as well: a crash may have left half a line.
		_, err = file.Write(slices.Concat([]byte("\n"), data, []byte("\n")))
	}
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		return err
	}
	if st.Size() > 0 {
		return nil
	}
	return syncDir(filepath.Dir(name))
}

// Statuses gives what stands beside a commit, sorted by key.
func (f *Forge) Statuses(ctx context.Context, r forge.Repo, commit string) ([]forge.Status, error) {
	if err := gitcmd.CheckObject(commit); err != nil {
		return nil, fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	repo, err := f.open(ctx, r)
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(f.statuses(repo, commit))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("localgit: statuses: %w", err)
	}
	newest := map[string]forge.Status{}
	for line := range bytes.Lines(data) {
		var s forge.Status
		// What is no status was cut short, by a crash or by our reading it now.
		if json.Unmarshal(line, &s) == nil && s.Version > newest[s.Key].Version {
			newest[s.Key] = s
		}
	}
	return slices.SortedFunc(maps.Values(newest), func(a, b forge.Status) int { return strings.Compare(a.Key, b.Key) }), nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// ForgetStatuses implements forge.StatusForgetter.
func (f *Forge) ForgetStatuses(ctx context.Context, r forge.Repo, commit string) error {
	if err := gitcmd.CheckObject(commit); err != nil {
		return fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	repo, err := f.open(ctx, r)
	repos := []repository{repo}
	if errors.Is(err, forge.ErrNotFound) { // only what is kept elsewhere outlives it
		repos, err = nil, nil
		if f.statusDir != "" {
			repos = []repository{{id: r.FullName()}, {id: r.FullName() + ".git"}}
		}
	}
	if err != nil {
		return err
	}
	for _, repo := range repos {
		name := f.statuses(repo, commit)
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("localgit: forget statuses: %w", err)
		}
		_ = os.Remove(filepath.Dir(name)) // of the last commit; otherwise it is not empty
	}
	return nil
}
