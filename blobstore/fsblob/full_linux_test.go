package fsblob

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// smallDisk mounts a file system of 8 MB.
func smallDisk(t *testing.T, options string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=8m"+options); err != nil {
		testenv.Missing(t, "a file system of 8 MB", fmt.Sprintf("mounting one needs root: %v", err))
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}

// TestFullDisk: on a file system that is full, of bytes or of names, a Put
// fails with an error that says so and leaves nothing; what is there stays as it
// is; and once there is room, the same store goes on.
func TestFullDisk(t *testing.T) {
	for name, c := range map[string]struct {
		options string
		size    int
	}{
		"bytes": {"", 1 << 20},
		// Each runs out of names at another step of a Put.
		"names 60": {",nr_inodes=60", 10},
		"names 61": {",nr_inodes=61", 10},
		"names 62": {",nr_inodes=62", 10},
		"names 63": {",nr_inodes=63", 10},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, smallDisk(t, c.options), Options{})
			content := func(i int) []byte { return bytes.Repeat([]byte{byte('a' + i%26)}, c.size) }
			put := func(i int) error {
				_, err := s.Put(t.Context(), fmt.Sprintf("runs/%d/jobs/log", i), bytes.NewReader(content(i)), blobstore.PutOptions{})
				return err
			}
			stored := 0
			var full error
			for full == nil {
				if full = put(stored); full == nil {
					stored++
				}
				if stored > 100 {
					t.Fatal("the disk does not fill")
				}
			}
			sound := func() {
				t.Helper()
				if left := leftovers(t, s); len(left) > 0 {
					t.Fatalf("left: %q", left)
				}
				for i := range stored {
					r, _, err := s.Get(t.Context(), fmt.Sprintf("runs/%d/jobs/log", i), blobstore.GetOptions{})
					if err != nil {
						t.Fatal(err)
					}
					got, err := io.ReadAll(r)
					r.Close()
					if err != nil || !bytes.Equal(got, content(i)) {
						t.Fatalf("object %d has %d bytes, error %v", i, len(got), err)
					}
				}
			}
			for range 3 {
				if !errors.Is(full, blobstore.ErrNoSpace) || !errors.Is(full, syscall.ENOSPC) || !strings.Contains(full.Error(), "runs/") {
					t.Fatalf("on a full disk: %v", full)
				}
				sound()
				full = put(stored)
			}
			if name == "bytes" { // what is there is replaced as a whole or not at all
				_, err := s.Put(t.Context(), "runs/0/jobs/log", bytes.NewReader(content(1)), blobstore.PutOptions{})
				if !errors.Is(err, blobstore.ErrNoSpace) {
					t.Fatalf("Put over an object: %v", err)
				}
				sound()
			}
			stored -= 2
			for i := range 2 {
				if err := s.Delete(t.Context(), fmt.Sprintf("runs/%d/jobs/log", stored+i), blobstore.DeleteOptions{}); err != nil {
					t.Fatalf("Delete on a full disk: %v", err)
				}
			}
			if err := put(stored); err != nil {
				t.Fatalf("with room again: %v", err)
			}
			stored++
			sound()
		})
	}
}
