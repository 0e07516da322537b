package gitserve

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// maxTree bounds what git says about a commit's tree: some 700,000 files.
const maxTree = 64 << 20

// archive writes the commit's tree as a tar: what a clone would check out, with
// submodules as empty directories. Not git archive, because that leaves out
// and rewrites files as the tree's attributes say (export-ignore,
// export-subst) and runs the filters that the repository's configuration names.
// The global header's comment is the commit, as git archive has it.
func (h *Handler) archive(ctx context.Context, w *response, dir, commit string) error {
	in := gitcmd.Options{
		Dir: dir, SafeDirectory: "*",
		// Not a repository further up, should this be none.
		Env: []string{"GIT_CEILING_DIRECTORIES=" + filepath.Dir(filepath.Clean(dir))},
	}
	when, err := h.commitTime(ctx, in, commit)
	if err != nil {
		return err
	}
	entries, err := h.tree(ctx, in, commit)
	if err != nil {
		return err
	}
	w.head("application/x-tar")
	buffered := bufio.NewWriterSize(w, 256<<10)
	out := &treeWriter{tar: tar.NewWriter(buffered), when: when}
	if err := out.tar.WriteHeader(&tar.Header{
		Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": commit},
	}); err != nil {
		return err
	}
	var wanted strings.Builder
	for _, e := range entries {
		if e.mode != gitlink {
			wanted.WriteString(e.object + "\n")
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	blobs, pipe := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		in := in
		in.Stdin, in.Stdout = strings.NewReader(wanted.String()), pipe
		pipe.CloseWithError(noEOF(h.c.Git.Run(ctx, in, "cat-file", "--batch", "--buffer")))
	}()
	defer func() {
		cancel()
		blobs.Close()
		<-done
	}()
	contents := bufio.NewReaderSize(blobs, 256<<10)
	for _, e := range entries {
		if err := out.write(e, contents); err != nil {
			return err
		}
	}
	if err := out.tar.Close(); err != nil {
		return err
	}
	return buffered.Flush()
}

const gitlink = "160000" // the mode of a submodule

// entry is a line of git ls-tree.
type entry struct{ mode, object, name string }

func (h *Handler) tree(ctx context.Context, in gitcmd.Options, commit string) ([]entry, error) {
	in.MaxOutput = maxTree
	list, err := h.c.Git.Output(ctx, in, "ls-tree", "-r", "-z", "--full-tree", commit)
	if err != nil {
		return nil, err
	}
	var entries []entry
	for line := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		meta, name, ok := strings.Cut(line, "\t")
		fields := strings.Fields(meta)
		switch {
		case line == "": // an empty tree
		case !ok || len(fields) != 3:
			return nil, fmt.Errorf("gitserve: unexpected tree entry %.80q", line)
		default:
			entries = append(entries, entry{fields[0], fields[2], name})
		}
	}
	return entries, nil
}

func (h *Handler) commitTime(ctx context.Context, in gitcmd.Options, commit string) (time.Time, error) {
	out, err := h.c.Git.Output(ctx, in, "rev-list", "--max-count=1", "--timestamp", "--end-of-options", commit)
	if _, ok := gitcmd.ExitCode(err); ok {
		return time.Time{}, fmt.Errorf("%w: %w", forge.ErrNotFound, err)
	}
	if err != nil {
		return time.Time{}, err
	}
	stamp, _, _ := strings.Cut(string(out), " ")
	seconds, err := strconv.ParseInt(stamp, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("gitserve: %s is not a commit", commit)
	}
	return time.Unix(seconds, 0), nil
}

type treeWriter struct {
	tar  *tar.Writer
	when time.Time
}

// maxLink bounds a symbolic link's target, which has to fit into memory.
const maxLink = 64 << 10

// write puts one entry into the tar, its content taken from cat-file's output.
func (t *treeWriter) write(e entry, blobs *bufio.Reader) error {
	head := &tar.Header{Name: e.name, ModTime: t.when, Format: tar.FormatPAX}
	if e.mode == gitlink {
		head.Typeflag, head.Name, head.Mode = tar.TypeDir, e.name+"/", 0o755
		return t.tar.WriteHeader(head)
	}
	line, err := blobs.ReadString('\n')
	if err != nil {
		return fmt.Errorf("gitserve: blob %s: %w", e.object, noEOF(err))
	}
	fields := strings.Fields(line)
	if len(fields) != 3 || fields[0] != e.object || fields[1] != "blob" {
		return fmt.Errorf("gitserve: blob %s: unexpected answer %.80q", e.object, line)
	}
	size, err := strconv.ParseInt(fields[2], 10, 64)
	if err != nil {
		return fmt.Errorf("gitserve: blob %s: %w", e.object, err)
	}
	switch e.mode {
	case "120000":
		if size > maxLink {
			return fmt.Errorf("gitserve: symbolic link %q is too long", e.name)
		}
		target := make([]byte, size)
		if _, err := io.ReadFull(blobs, target); err != nil {
			return fmt.Errorf("gitserve: blob %s: %w", e.object, noEOF(err))
		}
		head.Typeflag, head.Mode, head.Linkname = tar.TypeSymlink, 0o777, string(target)
		err = t.tar.WriteHeader(head)
	default:
		head.Typeflag, head.Mode, head.Size = tar.TypeReg, 0o644, size
		if e.mode == "100755" {
			head.Mode = 0o755
		}
		if err := t.tar.WriteHeader(head); err != nil {
			return err
		}
		_, err = io.CopyN(t.tar, blobs, size)
	}
	if err != nil {
		return fmt.Errorf("gitserve: %q: %w", e.name, noEOF(err))
	}
	_, err = blobs.Discard(1) // the line feed after the content
	return noEOF(err)
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
