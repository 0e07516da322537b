package libvirtvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// checkImage compares a machine's disk with its image, where that can be read
// here. An overlay that is smaller would cut the image off; one whose image
// refers to other files would show those to the guest.
func (c Config) checkImage(s vmprovider.Spec) error {
	img := s.Image
	if img.Path == "" || img.Format != "qcow2" && img.Format != "raw" {
		return invalid("image %q of format %q: want the path of a file, and qcow2 or raw", img.Path, img.Format)
	}
	if c.synthetic() || !c.local() {
		return nil
	}
	f, err := os.Open(img.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return invalid("image %s is not there", img.Path)
	}
	if err != nil {
		return nil // the hypervisor may be allowed to
	}
	defer func() { _ = f.Close() }()
	size, err := virtualSize(f, img.Format)
	if err != nil {
		return invalid("image %s: %v", img.Path, err)
	}
	if s.DiskBytes > 0 && s.DiskBytes < size {
		return invalid("a disk of %d bytes is smaller than its image %s of %d bytes", s.DiskBytes, img.Path, size)
	}
	return nil
}

// virtualSize reads the size of an image's disk, for qcow2 from its header
// (https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.txt).
func virtualSize(f *os.File, format string) (int64, error) {
	if format == "raw" {
		return f.Seek(0, io.SeekEnd)
	}
	var h struct {
		Magic, Version    uint32
		BackingFileOffset uint64
		BackingFileSize   uint32
		ClusterBits       uint32
		Size              uint64
		CryptMethod       uint32
		L1Size            uint32
		L1TableOffset     uint64
		RefcountOffset    uint64
		RefcountClusters  uint32
		Snapshots         uint32
		SnapshotsOffset   uint64
	}
	if err := binary.Read(f, binary.BigEndian, &h); err != nil || h.Magic != 'Q'<<24|'F'<<16|'I'<<8|0xfb {
		return 0, errors.New("it is no qcow2 image")
	}
	var incompatible uint64
	if h.Version >= 3 {
		if err := binary.Read(f, binary.BigEndian, &incompatible); err != nil {
			return 0, errors.New("its header is cut off")
		}
	}
	const externalData = 1 << 2
	switch {
	case h.BackingFileOffset != 0:
		return 0, errors.New("it has a backing file; qemu-img convert makes one that stands alone")
	case incompatible&externalData != 0:
		return 0, errors.New("its data is in another file; qemu-img convert makes one that stands alone")
	case h.Size > 1<<60:
		return 0, fmt.Errorf("a size of %d bytes", h.Size)
	}
	return int64(h.Size), nil
}
