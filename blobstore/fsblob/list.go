package fsblob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"slices"
	"strings"

	"github.com/solstice-ci/solstice-go/blobstore"
)

// List implements blobstore.Store. It holds at most pageSize names per level
// of directories; a directory with more is read several times.
func (s *Store) List(ctx context.Context, o blobstore.ListOptions) iter.Seq2[blobstore.Info, error] {
	return func(yield func(blobstore.Info, error) bool) {
		l := lister{s: s, ctx: ctx, o: o, yield: yield}
		if err := l.walk(".", ""); err != nil && !errors.Is(err, errStop) {
			yield(blobstore.Info{}, err)
		}
	}
}

// pageSize is a variable for tests.
var pageSize = 4096

var errStop = errors.New("the caller broke out")

type lister struct {
	s     *Store
	ctx   context.Context
	o     blobstore.ListOptions
	yield func(blobstore.Info, error) bool
}

// entry is one name of a directory. All keys below a directory begin with
// prefix ("a/b/", or part of an element where that is continued), so sorting
// by prefix sorts the keys below, too.
type entry struct {
	prefix string // an object's key
	name   string
	kind   kind
}

// wanted says whether an object is, or a directory may hold, what is asked for.
func (l *lister) wanted(e entry) bool {
	if e.kind == object {
		return strings.HasPrefix(e.prefix, l.o.Prefix) && e.prefix > l.o.After
	}
	return (strings.HasPrefix(e.prefix, l.o.Prefix) || strings.HasPrefix(l.o.Prefix, e.prefix)) &&
		(e.prefix > l.o.After || strings.HasPrefix(l.o.After, e.prefix))
}

func (l *lister) walk(dir, prefix string) error {
	last := ""
	for {
		page, more, err := l.page(dir, prefix, last)
		if err != nil {
			return err
		}
		for _, e := range page {
			last = e.prefix
			path := e.name
			if dir != "." {
				path = dir + "/" + e.name
			}
			if e.kind != object {
				if err := l.walk(path, e.prefix); err != nil {
					return err
				}
				continue
			}
			info, err := l.s.Stat(l.ctx, e.prefix)
			switch {
			case errors.Is(err, blobstore.ErrNotFound): // deleted meanwhile
			case err != nil:
				return err
			case !l.yield(info, nil):
				return errStop
			}
		}
		if !more {
			return nil
		}
	}
}

// page returns the wanted entries with the smallest prefixes after last.
func (l *lister) page(dir, prefix, last string) (page []entry, more bool, err error) {
	end, err := l.s.begin(l.ctx)
	if err != nil {
		return nil, false, err
	}
	defer end()
	d, err := l.s.root.Open(dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, false, nil // pruned meanwhile
		}
		return nil, false, fmt.Errorf("fsblob: list: %w", err)
	}
	defer d.Close()
	cut := func() {
		slices.SortFunc(page, func(a, b entry) int { return strings.Compare(a.prefix, b.prefix) })
		if len(page) > pageSize {
			clear(page[pageSize:])
			page, more = page[:pageSize], true
		}
	}
	for {
		if err := l.ctx.Err(); err != nil {
			return nil, false, err
		}
		entries, err := d.ReadDir(1024)
		for _, de := range entries {
			elem, k, ok := parseName(de.Name(), de.IsDir())
			if !ok {
				continue // temporary files, or not ours
			}
			e := entry{prefix + elem, de.Name(), k}
			if k == directory {
				e.prefix += "/"
			}
			if e.prefix > last && l.wanted(e) {
				if page = append(page, e); len(page) >= 2*pageSize {
					cut()
				}
			}
		}
		if errors.Is(err, io.EOF) {
			cut()
			return page, more, nil
		}
		if err != nil {
			return nil, false, fmt.Errorf("fsblob: list: %w", err)
		}
	}
}
