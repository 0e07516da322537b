// Package image provides the base images of virtual machines: a [Catalogue],
// which says what there is and where it comes from, and a [Store], a directory
// that holds each image once.
//
//	catalogue, err := image.ReadFile("images.yaml")
//	choice, err := catalogue.Resolve("debian-12")
//	store, err := image.Open(dir, image.Options{MaxBytes: 100 << 30})
//	pin, err := store.Ensure(ctx, choice.Image, nil)
//	defer pin.Release()
//	spec.Image = pin.Image() // the overlay of a machine stands on it
//
// Nothing is believed about an image but its SHA-256, which the catalogue has to
// give. Formats are declared and never probed. docs/images.md describes the
// catalogue, and what happens when something fails.
package image

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
)

// Errors that callers act on; use errors.Is.
var (
	// ErrInvalid: a catalogue or an image's description is wrong.
	ErrInvalid = errors.New("image: invalid")
	// ErrUnknown: the catalogue has no such label or size.
	ErrUnknown = errors.New("image: not in the catalogue")
	// ErrNotFound: the image is not in the store.
	ErrNotFound = errors.New("image: not in the store")
	// ErrInUse: the image is pinned or being made ready, by whichever process.
	ErrInUse = errors.New("image: in use")
	// ErrChecksum: what was downloaded or unpacked is not what the catalogue says.
	ErrChecksum = errors.New("image: wrong SHA-256")
	// ErrCorrupt: the image in the store is not what was stored.
	ErrCorrupt = errors.New("image: damaged in the store")
	// ErrTooLarge: the image is larger than allowed.
	ErrTooLarge = errors.New("image: too large")
	// ErrSource: the source cannot be had, and trying again will not help.
	ErrSource = errors.New("image: no such source")
)

// Formats of a disk.
const (
	QCOW2 = "qcow2"
	Raw   = "raw"
)

// Compressions of what is downloaded.
const (
	None = "none"
	XZ   = "xz"
	Zstd = "zstd"
	Gzip = "gz"
)

// Seeds, the kinds of disk that a guest's first-boot data is on.
const (
	SeedFAT = "fat"
	SeedISO = "iso"
)

var (
	formats      = []string{QCOW2, Raw}
	compressions = []string{None, XZ, Zstd, Gzip}
	seeds        = []string{SeedFAT, SeedISO}
)

// Image is an entry of a catalogue.
type Image struct {
	Label       string `json:"label"`                  // in lower case
	Source      string `json:"source"`                 // http or https URL, or an absolute path
	SHA256      string `json:"sha256"`                 // of the file at the source, 64 digits of lower-case hex
	ImageSHA256 string `json:"image_sha256,omitempty"` // of the unpacked image; "": not checked beyond SHA256
	Format      string `json:"format"`                 // QCOW2 or Raw
	Compression string `json:"compression"`            // None, XZ, Zstd or Gzip
	Seed        string `json:"seed"`                   // SeedFAT or SeedISO
	OS          string `json:"os"`                     // as Go calls it
	Arch        string `json:"arch"`                   // as Go calls it
	Size        string `json:"size,omitempty"`         // name of its default Size
	MaxBytes    int64  `json:"max_bytes,omitempty"`    // of the unpacked image; 0: Options.MaxImageBytes
}

// Size is what a machine gets; what is 0 is left to the provider.
type Size struct {
	CPUs        int   `json:"cpus,omitempty"`
	MemoryBytes int64 `json:"memory_bytes,omitempty"`
	DiskBytes   int64 `json:"disk_bytes,omitempty"`
}

var sha256Hex = regexp.MustCompile(`^[0-9a-f]{64}$`)

// nothing is the SHA-256 of an empty file, which many a failed download was
// taken for an image of.
const nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// key names the image's files in a store. It is made of the hash and of how it
// is unpacked only: nothing else that a catalogue says gets into a path.
func (i Image) key() (string, error) {
	if !sha256Hex.MatchString(i.SHA256) {
		return "", fmt.Errorf("%w: %s: the SHA-256 is not 64 digits of lower-case hex", ErrInvalid, i.Label)
	}
	if i.SHA256 == nothing {
		return "", fmt.Errorf("%w: %s: this is the SHA-256 of an empty file", ErrInvalid, i.Label)
	}
	if i.ImageSHA256 != "" && !sha256Hex.MatchString(i.ImageSHA256) {
		return "", fmt.Errorf("%w: %s: the image's SHA-256 is not 64 digits of lower-case hex", ErrInvalid, i.Label)
	}
	switch i.Compression {
	case None, "":
		return i.SHA256, nil
	case XZ, Zstd, Gzip:
		return i.SHA256 + "." + i.Compression, nil
	}
	return "", fmt.Errorf("%w: %s: unknown compression %q", ErrInvalid, i.Label, i.Compression)
}

func (i Image) compressed() bool { return i.Compression != None && i.Compression != "" }

// imageSHA256 is what the unpacked image has to have; "" when nobody knows.
func (i Image) imageSHA256() string {
	if !i.compressed() {
		return i.SHA256
	}
	return i.ImageSHA256
}

// remote is the URL of a source that has one.
func remote(source string) (*url.URL, bool) {
	u, err := url.Parse(source)
	return u, err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != ""
}

// shown is a source for people: a query can hold what is nobody's business.
func shown(source string) string {
	u, ok := remote(source)
	if !ok {
		return source
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}

// checkSource returns a source as a store takes it; dir is what relative paths
// are relative to, and cannot leave.
func checkSource(source, dir string) (string, error) {
	if scheme, _, ok := strings.Cut(source, "://"); ok {
		u, ok := remote(source)
		switch {
		case scheme != "http" && scheme != "https":
			return "", fmt.Errorf("a source is an http or https URL or a path, not %q", scheme)
		case !ok:
			return "", errors.New("the URL is wrong")
		case u.User != nil:
			return "", errors.New("credentials do not belong into a URL")
		}
		return source, nil
	}
	switch {
	case source == "" || strings.ContainsRune(source, 0):
		return "", errors.New("a source is an http or https URL or a path")
	case filepath.IsAbs(source):
		return filepath.Clean(source), nil
	case !filepath.IsLocal(source):
		return "", errors.New("a relative path cannot leave the catalogue's directory; give an absolute one")
	}
	abs, err := filepath.Abs(filepath.Join(dir, source))
	if err != nil {
		return "", err
	}
	return abs, nil
}

// sumText is a finished hash.
func sumText(sum []byte) string { return hex.EncodeToString(sum) }
