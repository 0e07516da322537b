package image

import (
	"errors"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// errBusy: another holder, of this process or another, is in the way.
var errBusy = errors.New("locked")

// lock takes an image's lock without waiting, unix.LOCK_SH to use the image or
// unix.LOCK_EX to change anything about it. It is held until the file is closed
// or the process dies.
func (s *Store) lock(key string, how int) (*os.File, error) {
	for {
		f, err := s.root.OpenFile(key+".lock", os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		for err = unix.EINTR; errors.Is(err, unix.EINTR); {
			err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errBusy
		}
		if err != nil {
			_ = f.Close() // nothing was written
			return nil, err
		}
		// Who removes an image removes its lock, which someone may have opened just
		// before: that lock keeps nobody away.
		held, err := f.Stat()
		if err == nil {
			var there os.FileInfo
			if there, err = s.root.Stat(key + ".lock"); err == nil && os.SameFile(held, there) {
				return f, nil
			}
		}
		_ = f.Close()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
}

// lockNow is lock for who cannot wait, but has to bear with those who look
// whether an image is in use, which takes a moment.
func (s *Store) lockNow(key string, how int) (f *os.File, err error) {
	for range 5 {
		if f, err = s.lock(key, how); !errors.Is(err, errBusy) {
			return f, err
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, err
}

// used says that the image was used just now.
func (s *Store) used(key string) error {
	now := time.Now()
	return s.root.Chtimes(key+".lock", now, now)
}
