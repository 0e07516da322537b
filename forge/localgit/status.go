package localgit

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// A report is the file <commit>/<SHA-256 of the key>/<version>.json. Linking it
// into place fails where that version was reported before, readers take the
// highest version, and writers remove what theirs supersedes: reports of
// several processes need no lock, and in any order converge.

// statuses is the directory of a commit's statuses.
func (f *Forge) statuses(repo repository, commit string) string {
	if f.statusDir != "" {
		return filepath.Join(f.statusDir, url.PathEscape(repo.id), commit)
	}
	return filepath.Join(repo.common, "solstice", "statuses", commit)
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
	sum := sha256.Sum256([]byte(s.Key))
	dir := filepath.Join(f.statuses(repo, commit), hex.EncodeToString(sum[:]))
	if err := writeStatus(dir, s); err != nil {
		return fmt.Errorf("localgit: report status: %w", err)
	}
	return nil
}

func writeStatus(dir string, s forge.Status) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	versions, err := reported(dir)
	if err != nil {
		return err
	}
	if len(versions) > 0 && versions[len(versions)-1] >= s.Version {
		return nil
	}
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, "."+rand.Text())
	defer os.Remove(tmp)
	if err := writeSynced(tmp, append(data, '\n')); err != nil {
		return err
	}
	if err := os.Link(tmp, statusFile(dir, s.Version)); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	for _, v := range versions {
		if err := os.Remove(statusFile(dir, v)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
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
	dir := f.statuses(repo, commit)
	keys, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("localgit: statuses: %w", err)
	}
	var all []forge.Status
	for _, key := range keys {
		s, ok, err := readStatus(ctx, filepath.Join(dir, key.Name()))
		if err != nil {
			return nil, fmt.Errorf("localgit: statuses: %w", err)
		}
		if ok {
			all = append(all, s)
		}
	}
	slices.SortFunc(all, func(a, b forge.Status) int { return strings.Compare(a.Key, b.Key) })
	return all, nil
}

// readStatus gives the highest version of one key; ok is false where a first
// report is still being written.
func readStatus(ctx context.Context, dir string) (s forge.Status, ok bool, err error) {
	for ctx.Err() == nil {
		versions, err := reported(dir)
		if err != nil || len(versions) == 0 {
			return s, false, err
		}
		data, err := os.ReadFile(statusFile(dir, versions[len(versions)-1]))
		if errors.Is(err, fs.ErrNotExist) {
			continue // superseded since it was listed
		}
		if err != nil {
			return s, false, err
		}
		if err := json.Unmarshal(data, &s); err != nil {
			return s, false, fmt.Errorf("%s: %w", dir, err)
		}
		return s, true, nil
	}
	return s, false, ctx.Err()
}

func statusFile(dir string, version int64) string {
	return filepath.Join(dir, strconv.FormatInt(version, 10)+".json")
}

// reported lists the versions in a key's directory, ascending.
func reported(dir string) ([]int64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var versions []int64
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if v, err := strconv.ParseInt(name, 10, 64); ok && err == nil {
			versions = append(versions, v)
		}
	}
	slices.Sort(versions)
	return versions, nil
}

func writeSynced(name string, data []byte) error {
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	return errors.Join(err, file.Sync(), file.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
