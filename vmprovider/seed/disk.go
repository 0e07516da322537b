package seed

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/diskfs/go-diskfs/backend"
	backendfile "github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem"
	"github.com/diskfs/go-diskfs/filesystem/fat12"
	"github.com/diskfs/go-diskfs/filesystem/iso9660"
)

// Sizes in bytes.
const (
	fatSize = 1 << 20
	sector  = 512
	block   = 2048 // of a CD-ROM
)

// buildFAT makes a disk with a FAT12 file system, which has long names.
func buildFAT(files []file) (_ []byte, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("seed: make FAT: %w", err)
		}
	}()
	disk := &memory{data: make([]byte, fatSize)}
	vol, err := fat12.Create(disk, fatSize, 0, sector, Label, true)
	if err != nil {
		return nil, err
	}
	if err := write(vol, files); err != nil {
		return nil, err
	}
	if err := vol.Close(); err != nil {
		return nil, err
	}
	freeCluster2(disk.data)
	return disk.data, nil
}

// freeCluster2 undoes that the library takes the first cluster for the root
// directory, which FAT12 keeps elsewhere: fsck.fat finds a cluster of no file.
func freeCluster2(disk []byte) {
	reserved, fats := int(binary.LittleEndian.Uint16(disk[14:])), int(disk[16])
	length := int(binary.LittleEndian.Uint16(disk[22:]))
	for i := range fats {
		fat := disk[(reserved+i*length)*sector:]
		fat[3], fat[4] = 0, fat[4]&0xf0 // entries have 12 bits
	}
}

// buildISO makes an image of a CD-ROM. The library gathers the files in a
// directory, which only this user can read, for that moment.
func buildISO(files []file) (_ []byte, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("seed: make ISO: %w", err)
		}
	}()
	dir, err := os.MkdirTemp("", "solstice-seed-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	out := filepath.Join(dir, "iso")
	disk, err := backendfile.CreateFromPath(out, 16<<20)
	if err != nil {
		return nil, err
	}
	defer func() { _ = disk.Close() }()
	work := filepath.Join(dir, "files")
	if err := os.Mkdir(work, 0o700); err != nil {
		return nil, err
	}
	vol, err := iso9660.Create(disk, 16<<20, 0, block, work)
	if err != nil {
		return nil, err
	}
	if err := write(vol, files); err != nil {
		return nil, err
	}
	if err := vol.Finalize(iso9660.FinalizeOptions{RockRidge: true, Joliet: true, VolumeIdentifier: Label}); err != nil {
		return nil, err
	}
	image, err := os.ReadFile(out)
	if err != nil {
		return nil, err
	}
	// The file is as long as it was made; the first volume descriptor says how
	// much of it is the volume (ECMA-119, 8.4.8).
	size := int(binary.LittleEndian.Uint32(image[16*block+80:])) * block
	if size == 0 || size > len(image) {
		return nil, fmt.Errorf("volume of %d bytes in a file of %d", size, len(image))
	}
	return image[:size], nil
}

func write(vol filesystem.FileSystem, files []file) error {
	for _, f := range files {
		w, err := vol.OpenFile(f.name, os.O_CREATE|os.O_RDWR)
		if err != nil {
			return err
		}
		_, err = io.Copy(w, bytes.NewReader(f.content))
		if err := errors.Join(err, w.Close()); err != nil {
			return err
		}
	}
	return nil
}

// memory is a disk without a file, since a seed holds a secret.
type memory struct {
	data []byte
	off  int64
}

func (m *memory) Sys() (*os.File, error)                  { return nil, errors.ErrUnsupported }
func (m *memory) Path() string                            { return "" }
func (m *memory) Writable() (backend.WritableFile, error) { return m, nil }
func (m *memory) Close() error                            { return nil }
func (m *memory) Stat() (fs.FileInfo, error)              { return info(len(m.data)), nil }

func (m *memory) Read(p []byte) (int, error) {
	n, err := m.ReadAt(p, m.off)
	m.off += int64(n)
	return n, err
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(m.data).ReadAt(p, off)
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > int64(len(m.data)) {
		return 0, io.ErrShortWrite
	}
	return copy(m.data[off:], p), nil
}

func (m *memory) Seek(off int64, whence int) (int64, error) {
	at, err := bytes.NewReader(m.data).Seek(off, whence)
	if whence == io.SeekCurrent {
		at, err = m.off+off, nil
	}
	if err == nil {
		m.off = at
	}
	return at, err
}

// info describes a memory by its size.
type info int64

func (info) Name() string       { return "seed" }
func (i info) Size() int64      { return int64(i) }
func (info) Mode() fs.FileMode  { return 0o600 }
func (info) ModTime() time.Time { return time.Time{} }
func (info) IsDir() bool        { return false }
func (info) Sys() any           { return nil }
