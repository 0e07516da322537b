package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/vmprovider/image"
)

type imageCmd struct {
	List   imageListCmd   `cmd:"" help:"List the images of the catalogue and of the store."`
	Pull   imagePullCmd   `cmd:"" help:"Download images, check and unpack them."`
	Verify imageVerifyCmd `cmd:"" help:"Read images in whole and compare them with what was stored."`
	Remove imageRemoveCmd `cmd:"" help:"Remove images from the store."`
	Evict  imageEvictCmd  `cmd:"" help:"Remove images that were not used for long."`
}

// images are the flags of commands that work on the store, which may be in use.
type images struct {
	daemon.State

	Catalogue string `group:"Images" env:"IMAGE_CATALOGUE" placeholder:"FILE" help:"The catalogue of images; see docs/images.md."`
	ImageDir  string `group:"Images" env:"IMAGE_DIR" placeholder:"DIR" help:"Directory of downloaded images. Default: images in the state directory."`

	evict image.Options
}

// open gives the catalogue, empty where none is needed and given, and the store.
func (i *images) open(needed bool, do func(*image.Catalogue, *image.Store) error) (err error) {
	c := &image.Catalogue{}
	switch {
	case i.Catalogue != "":
		if c, err = image.ReadFile(i.Catalogue); err != nil {
			return unable("the catalogue of images cannot be used", err, "")
		}
	case needed:
		return unable("there is no catalogue of images", nil, "give --catalogue FILE; docs/images.md says how to write one")
	}
	dir := i.ImageDir
	if dir == "" {
		if i.StateDir == "" {
			return unable("there is no directory for images", nil, "give --image-dir")
		}
		state, err := i.State.Open()
		if err != nil {
			return couldNot(err)
		}
		dir = filepath.Join(state, "images")
	}
	s, err := image.Open(dir, i.evict)
	if err != nil {
		return unable("cannot open the store of images", err, "")
	}
	defer func() { _ = s.Close() }() // nothing is written any more
	return do(c, s)
}

// chosen are the images of the labels, all of the catalogue for none.
func chosen(c *image.Catalogue, labels []string) ([]image.Image, error) {
	if len(labels) == 0 {
		labels = c.Labels()
	}
	var out []image.Image
	for _, l := range labels {
		choice, err := c.Resolve(l)
		if err != nil {
			return nil, problem("there is no such image", err, "solstice image list shows those that there are")
		}
		if !slices.ContainsFunc(out, func(i image.Image) bool { return i.Label == choice.Image.Label }) {
			out = append(out, choice.Image)
		}
	}
	return out, nil
}

// imageJSON is an image of the catalogue, of the store, or of both.
type imageJSON struct {
	image.Image
	Catalogued bool      `json:"catalogued"`
	State      string    `json:"state"` // absent, partial, ready, damaged
	Bytes      int64     `json:"bytes"` // in the store
	InUse      bool      `json:"in_use"`
	LastUse    time.Time `json:"last_use,omitzero"`
	Verified   time.Time `json:"verified,omitzero"`
	Path       string    `json:"path,omitempty"`
}

type imageListCmd struct {
	images
	output
}

// Run is kong's.
func (c *imageListCmd) Run(e *env) error {
	return c.open(false, func(cat *image.Catalogue, s *image.Store) error {
		entries, err := s.List(e.ctx)
		if err != nil {
			return unable("cannot list the store of images", err, "")
		}
		list := listed(cat, entries)
		if c.JSON {
			return document(struct {
				Images []imageJSON `json:"images"`
			}{list})
		}
		out, t := c.screen(), table{}
		out.header(&t, "LABEL", "STATE", "SIZE", "OS", "ARCH", "FORMAT", "USED", "SHA-256")
		now := time.Now()
		for _, i := range list {
			size, used := "-", "-"
			if i.State != "absent" {
				size, used = amount(i.Bytes), age(i.LastUse, now)
			}
			if i.InUse {
				used = "in use"
			}
			label := plain(i.Label)
			if !i.Catalogued {
				label = out.faint(cmp.Or(label, "-") + " (not in the catalogue)")
			}
			t.row(label, i.State, size, cmp.Or(i.OS, "-"), cmp.Or(i.Arch, "-"), cmp.Or(i.Format, "-"), used, i.SHA256[:12])
		}
		t.print(out, "")
		return nil
	})
}

// listed joins what should be there with what is.
func listed(c *image.Catalogue, entries []image.Entry) []imageJSON {
	list := []imageJSON{}
	known := map[int]bool{}
	for _, label := range c.Labels() {
		j := imageJSON{Image: c.Images[label], Catalogued: true, State: "absent"}
		for n, e := range entries {
			if same(e.Image, j.Image) {
				known[n] = true
				j.fill(e)
			}
		}
		list = append(list, j)
	}
	for n, e := range entries {
		if !known[n] {
			j := imageJSON{Image: e.Image}
			j.fill(e)
			list = append(list, j)
		}
	}
	return list
}

func (j *imageJSON) fill(e image.Entry) {
	j.State, j.Bytes, j.InUse, j.LastUse, j.Verified, j.Path = string(e.State), e.Bytes, e.InUse, e.LastUse, e.Verified, e.Path
}

// same: the files in the store are the same.
func same(a, b image.Image) bool { return a.SHA256 == b.SHA256 && a.Compression == b.Compression }

// amount is a number of bytes for people.
func amount(n int64) string {
	for _, u := range []struct {
		name string
		size int64
	}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if n >= u.size {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(u.size), u.name)
		}
	}
	return fmt.Sprintf("%d B", n)
}

// progress shows how far an image is, on a terminal; end removes it.
func progress(label string) (show func(image.Progress), end func()) {
	if !term.IsTerminal(int(os.Stderr.Fd())) {
		return nil, func() {}
	}
	show = func(p image.Progress) {
		text := amount(p.Done)
		if p.Total > 0 {
			text = fmt.Sprintf("%s of %s, %d%%", text, amount(p.Total), p.Done*100/p.Total)
		}
		if p.Phase == image.Waiting {
			text = "for another process"
		}
		_, _ = fmt.Fprintf(os.Stderr, "\r\x1b[K%s: %s %s", plain(label), p.Phase, text)
	}
	return show, func() { _, _ = fmt.Fprint(os.Stderr, "\r\x1b[K") }
}

type imagePullCmd struct {
	images
	output
	Labels []string `arg:"" optional:"" name:"label" help:"Labels or aliases; none: all of the catalogue."`
}

// Help is kong's.
func (imagePullCmd) Help() string {
	return `What is in the store already is not downloaded again; a download that was interrupted goes on. Orchestrators and other commands may use the store meanwhile.`
}

// Run is kong's.
func (c *imagePullCmd) Run(e *env) error {
	return c.open(true, func(cat *image.Catalogue, s *image.Store) error {
		imgs, err := chosen(cat, c.Labels)
		if err != nil {
			return err
		}
		for _, img := range imgs {
			show, end := progress(img.Label)
			pin, err := s.Ensure(e.ctx, img, show)
			end()
			if err != nil {
				return unable("cannot get the image "+img.Label, err, imageAdvice(err))
			}
			_ = pin.Release() // it is only about the time of last use
			if err := c.say(img, pin); err != nil {
				return err
			}
		}
		return nil
	})
}

// say tells where an image is: with --json an object per line.
func (c *imagePullCmd) say(img image.Image, pin *image.Pin) error {
	if c.JSON {
		return line(imageJSON{Image: img, Catalogued: true, State: string(image.Ready), Bytes: pin.Bytes(), Path: pin.Path()})
	}
	_, err := fmt.Printf("%s %s %s\n", img.Label, amount(pin.Bytes()), pin.Path())
	return printed(err)
}

func imageAdvice(err error) string {
	switch {
	case errors.Is(err, image.ErrChecksum):
		return "compare sha256 in the catalogue with what the vendor publishes: the file may have been replaced by a newer one"
	case errors.Is(err, image.ErrTooLarge):
		return "give the image a larger max_size in the catalogue, if it is right"
	case errors.Is(err, image.ErrInvalid):
		return "correct compression and format in the catalogue"
	case errors.Is(err, image.ErrSource) && !errors.Is(err, fs.ErrNotExist):
		return "look for the image at the vendor's: it may have moved"
	}
	return ""
}

type imageVerifyCmd struct {
	images
	output
	Labels []string `arg:"" optional:"" name:"label" help:"Labels or aliases; none: all that is in the store."`
}

// Run is kong's.
func (c *imageVerifyCmd) Run(e *env) error {
	return c.open(len(c.Labels) > 0, func(cat *image.Catalogue, s *image.Store) error {
		imgs, err := c.chosen(e.ctx, cat, s)
		if err != nil {
			return err
		}
		bad := 0
		for _, img := range imgs {
			name := cmp.Or(img.Label, img.SHA256)
			show, end := progress(name)
			err := s.Verify(e.ctx, img, show)
			end()
			state := string(image.Ready)
			switch {
			case err == nil:
			case errors.Is(err, image.ErrCorrupt):
				state = string(image.Damaged)
			case errors.Is(err, image.ErrNotFound):
				state = "absent"
			default:
				return unable("cannot verify the image "+name, err, "")
			}
			if err != nil {
				bad++
			}
			if c.JSON {
				err = line(imageJSON{Image: img, Catalogued: cat.Images[img.Label].SHA256 == img.SHA256, State: state})
			} else {
				_, err = fmt.Printf("%s %s\n", plain(name), state)
				err = printed(err)
			}
			if err != nil {
				return err
			}
		}
		if bad > 0 {
			return problem(fmt.Sprintf("%d of %d images are not as they have to be", bad, len(imgs)), nil, "solstice image pull replaces them")
		}
		return nil
	})
}

func (c *imageVerifyCmd) chosen(ctx context.Context, cat *image.Catalogue, s *image.Store) ([]image.Image, error) {
	if len(c.Labels) > 0 {
		return chosen(cat, c.Labels)
	}
	entries, err := s.List(ctx)
	if err != nil {
		return nil, unable("cannot list the store of images", err, "")
	}
	var out []image.Image
	for _, i := range listed(cat, entries) {
		if i.State == string(image.Ready) || i.State == string(image.Damaged) {
			out = append(out, i.Image)
		}
	}
	return out, nil
}

type imageRemoveCmd struct {
	images
	Labels []string `arg:"" name:"label" help:"Labels or aliases, or at least 12 digits of the SHA-256 of an image in the store."`
}

// Run is kong's.
func (c *imageRemoveCmd) Run(e *env) error {
	return c.open(false, func(cat *image.Catalogue, s *image.Store) error {
		entries, err := s.List(e.ctx)
		if err != nil {
			return unable("cannot list the store of images", err, "")
		}
		var imgs []image.Image
		for _, l := range c.Labels {
			img, err := meant(cat, entries, l)
			if err != nil {
				return err
			}
			imgs = append(imgs, img)
		}
		for n, img := range imgs {
			switch err := s.Remove(e.ctx, img); {
			case errors.Is(err, image.ErrInUse):
				return problem("the image "+c.Labels[n]+" is in use", err, "wait until no machine needs it any more")
			case errors.Is(err, image.ErrNotFound):
				return problem("the image "+c.Labels[n]+" is not in the store", nil, "")
			case err != nil:
				return unable("cannot remove the image "+c.Labels[n], err, "")
			}
			if _, err := fmt.Printf("removed %s\n", plain(c.Labels[n])); err != nil {
				return printed(err)
			}
		}
		return nil
	})
}

type imageEvictCmd struct {
	images
	MaxSize imageSize     `placeholder:"SIZE" help:"Remove those that were not used for longest until the rest is no larger, as in 50GiB."`
	MaxAge  time.Duration `placeholder:"DURATION" help:"Remove those that were not used for so long, as in 720h."`
}

// imageSize is a number of bytes, written like 50GiB.
type imageSize int64

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *imageSize) UnmarshalText(text []byte) error {
	n, err := image.ParseBytes(string(text))
	*b = imageSize(n)
	return err
}

// Run is kong's.
func (c *imageEvictCmd) Run(e *env) error {
	if c.MaxSize <= 0 && c.MaxAge <= 0 {
		return unable("nothing says what is to go", nil, "give --max-size, --max-age, or both")
	}
	c.evict = image.Options{MaxBytes: int64(c.MaxSize), MaxAge: c.MaxAge}
	return c.open(false, func(_ *image.Catalogue, s *image.Store) error {
		before, err := s.List(e.ctx)
		if err != nil {
			return unable("cannot list the store of images", err, "")
		}
		if err := s.Evict(e.ctx); err != nil {
			return unable("cannot remove what was not used for long", err, "")
		}
		after, err := s.List(e.ctx)
		if err != nil {
			return unable("cannot list the store of images", err, "")
		}
		for _, i := range before {
			if slices.ContainsFunc(after, func(j image.Entry) bool { return j.Image.SHA256 == i.Image.SHA256 }) {
				continue
			}
			if _, err := fmt.Printf("removed %s\n", plain(cmp.Or(i.Image.Label, i.Image.SHA256))); err != nil {
				return printed(err)
			}
		}
		return nil
	})
}

// meant is the image of a label, an alias or the beginning of a hash.
func meant(cat *image.Catalogue, entries []image.Entry, name string) (image.Image, error) {
	choice, err := cat.Resolve(name)
	if err == nil {
		return choice.Image, nil
	}
	var found []image.Image
	for _, e := range entries {
		if e.Image.Label == strings.ToLower(name) || len(name) >= 12 && strings.HasPrefix(e.Image.SHA256, strings.ToLower(name)) {
			found = append(found, e.Image)
		}
	}
	switch len(found) {
	case 0:
		return image.Image{}, problem("there is no such image", err, "solstice image list shows those that there are")
	case 1:
		return found[0], nil
	}
	return image.Image{}, problem("several images are called "+name, nil, "give the SHA-256 instead")
}
