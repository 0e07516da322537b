package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"

	"github.com/solstice-ci/solstice-go/internal/nearest"
)

// maxCatalogueBytes bounds a catalogue's file.
const maxCatalogueBytes = 1 << 20

// Catalogue says which images there are. Labels are in lower case.
type Catalogue struct {
	DefaultLabel string            // what Resolve("") means; may be empty
	Aliases      map[string]string // label to label, which may be an alias again
	Sizes        map[string]Size
	Images       map[string]Image // by label
}

// Choice is what a label stands for.
type Choice struct {
	Image Image
	Size  Size // the image's default; zero when it has none
}

// Problem is something wrong in a catalogue; lines and columns count from 1,
// columns in bytes.
type Problem struct {
	Line, Column int
	Message      string
}

// CatalogueError is all that is wrong in a catalogue, in the order of the file.
// It wraps ErrInvalid.
type CatalogueError struct {
	Path     string
	Problems []Problem
}

// Error has a line per problem, with file, line and column.
func (e *CatalogueError) Error() string {
	lines := make([]string, 0, len(e.Problems))
	for _, p := range e.Problems {
		lines = append(lines, fmt.Sprintf("%s:%d:%d: %s", e.Path, p.Line, p.Column, p.Message))
	}
	return strings.Join(lines, "\n")
}

// Unwrap is ErrInvalid.
func (e *CatalogueError) Unwrap() error { return ErrInvalid }

// ReadFile reads a catalogue's file.
func ReadFile(path string) (*Catalogue, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // only read from
	data, err := io.ReadAll(io.LimitReader(f, maxCatalogueBytes+1))
	if err != nil {
		return nil, err
	}
	return Parse(path, data)
}

// Parse reads a catalogue, in YAML; docs/images.md describes it. The path is for
// messages, and its directory what relative sources are relative to. What is
// wrong is a *CatalogueError that names all of it.
func Parse(path string, data []byte) (*Catalogue, error) {
	p := &parser{dir: filepath.Dir(path)}
	c := p.catalogue(data)
	if len(p.problems) == 0 {
		return c, nil
	}
	slices.SortStableFunc(p.problems, func(a, b Problem) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	return nil, &CatalogueError{path, p.problems}
}

// Resolve finds the image and the size that a label, or an alias, stands for; ""
// is the default label. Case does not matter. Otherwise the error wraps
// ErrUnknown.
func (c *Catalogue) Resolve(label string) (Choice, error) {
	if label == "" {
		if c.DefaultLabel == "" {
			return Choice{}, fmt.Errorf("%w: there is no default_label", ErrUnknown)
		}
		label = c.DefaultLabel
	}
	name := strings.ToLower(label)
	for range len(c.Aliases) + 1 {
		if img, ok := c.Images[name]; ok {
			return Choice{img, c.Sizes[img.Size]}, nil
		}
		to, ok := c.Aliases[name]
		if !ok {
			return Choice{}, fmt.Errorf("%w: label %q%s", ErrUnknown, name, c.didYouMean(name))
		}
		name = to
	}
	return Choice{}, fmt.Errorf("%w: alias %q leads in a circle", ErrInvalid, label)
}

// Size finds a size by its name; otherwise the error wraps ErrUnknown.
func (c *Catalogue) Size(name string) (Size, error) {
	s, ok := c.Sizes[strings.ToLower(name)]
	if !ok {
		return Size{}, fmt.Errorf("%w: size %q%s", ErrUnknown, name, didYouMean(name, slices.Sorted(maps.Keys(c.Sizes))))
	}
	return s, nil
}

// Labels are the images' labels, sorted.
func (c *Catalogue) Labels() []string { return slices.Sorted(maps.Keys(c.Images)) }

func (c *Catalogue) didYouMean(label string) string {
	return didYouMean(label, append(c.Labels(), slices.Sorted(maps.Keys(c.Aliases))...))
}

func didYouMean(got string, names []string) string {
	if n := nearest.To(got, names); n != "" {
		return fmt.Sprintf(" (did you mean %q?)", n)
	}
	return ""
}

// parser walks a catalogue's nodes and goes on after a problem, to find all.
type parser struct {
	dir      string
	problems []Problem
}

// maxProblems bounds what a hostile file can make us say.
const maxProblems = 100

func (p *parser) at(n *yaml.Node, format string, args ...any) {
	p.add(n.Line, n.Column, format, args...)
}

func (p *parser) add(line, column int, format string, args ...any) {
	if len(p.problems) < maxProblems {
		p.problems = append(p.problems, Problem{max(line, 1), max(column, 1), fmt.Sprintf(format, args...)})
	}
}

func (p *parser) catalogue(data []byte) *Catalogue {
	c := &Catalogue{Aliases: map[string]string{}, Sizes: map[string]Size{}, Images: map[string]Image{}}
	root := p.load(data)
	if root == nil {
		return c
	}
	where := map[string]*yaml.Node{} // labels, of images and aliases
	targets := map[string]*yaml.Node{}
	sizeNames := map[string]*yaml.Node{}
	var defaultLabel *yaml.Node
	p.fields(root, "the catalogue", map[string]func(*yaml.Node){
		"default_label": func(n *yaml.Node) { c.DefaultLabel, defaultLabel = strings.ToLower(p.text(n)), n },
		"aliases": func(n *yaml.Node) {
			p.named(n, "alias", where, func(name string, v *yaml.Node) {
				c.Aliases[name], targets[name] = strings.ToLower(p.text(v)), v
			})
		},
		"sizes": func(n *yaml.Node) {
			p.named(n, "size", map[string]*yaml.Node{}, func(name string, v *yaml.Node) { c.Sizes[name] = p.size(v) })
		},
		"images": func(n *yaml.Node) {
			p.named(n, "image", where, func(name string, v *yaml.Node) {
				img := p.image(name, v, sizeNames)
				c.Images[name] = img
			})
		},
	})
	if len(c.Images) == 0 && len(p.problems) == 0 {
		p.at(root, "there are no images")
	}
	for label, n := range sizeNames {
		if _, ok := c.Sizes[c.Images[label].Size]; !ok {
			p.at(n, "unknown size %q%s", n.Value, didYouMean(n.Value, slices.Sorted(maps.Keys(c.Sizes))))
		}
	}
	for alias, n := range targets {
		p.alias(c, alias, n)
	}
	if defaultLabel != nil && c.Images[c.DefaultLabel].Label == "" && c.Aliases[c.DefaultLabel] == "" {
		p.at(defaultLabel, "default_label: unknown label %q%s", c.DefaultLabel, c.didYouMean(c.DefaultLabel))
	}
	return c
}

// alias checks where an alias leads to.
func (p *parser) alias(c *Catalogue, alias string, n *yaml.Node) {
	path := []string{alias}
	for name := c.Aliases[alias]; ; name = c.Aliases[name] {
		switch _, isImage := c.Images[name]; {
		case isImage:
			return
		case slices.Contains(path, name):
			if name == alias { // each of a circle says so itself
				p.at(n, "alias %q leads in a circle: %s", alias, strings.Join(append(path, name), " → "))
			}
			return
		case c.Aliases[name] == "":
			if len(path) == 1 {
				p.at(n, "alias %q: unknown label %q%s", alias, name, c.didYouMean(name))
			}
			return
		}
		path = append(path, name)
	}
}

// load reads the one document that there may be.
func (p *parser) load(data []byte) *yaml.Node {
	if len(data) > maxCatalogueBytes {
		p.add(1, 1, "the file is larger than %d bytes", maxCatalogueBytes)
		return nil
	}
	if !utf8.Valid(data) {
		line, column := 1, 1
		for rest := data; len(rest) > 0; {
			r, n := utf8.DecodeRune(rest)
			if r == utf8.RuneError && n == 1 {
				break
			}
			if column += n; r == '\n' {
				line, column = line+1, 1
			}
			rest = rest[n:]
		}
		p.add(line, column, "the file is not valid UTF-8")
		return nil
	}
	l, err := yaml.NewLoader(bytes.NewReader(data))
	var doc yaml.Node
	if err == nil {
		err = l.Load(&doc)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		p.syntax(err)
		return nil
	}
	if len(doc.Content) == 0 {
		p.add(1, 1, "the catalogue is empty")
		return nil
	}
	var second yaml.Node
	switch err := l.Load(&second); {
	case err == nil:
		p.at(&second, "a second YAML document begins here")
		return nil
	case !errors.Is(err, io.EOF):
		p.syntax(err)
		return nil
	}
	return doc.Content[0]
}

func (p *parser) syntax(err error) {
	var all *yaml.LoadErrors
	var one *yaml.LoadError
	if errors.As(err, &all) && len(all.Errors) > 0 {
		one = all.Errors[0]
	}
	if one == nil && !errors.As(err, &one) {
		p.add(1, 1, "not valid YAML: %v", err)
		return
	}
	p.add(one.Mark.Line, one.Mark.Column, "not valid YAML: %s", one.Message)
}

// pairs walks a mapping with text for keys.
func (p *parser) pairs(n *yaml.Node, what string, visit func(k, v *yaml.Node)) {
	if n.Kind != yaml.MappingNode {
		p.at(n, "%s has to be a mapping", what)
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		if k.Kind != yaml.ScalarNode || k.ShortTag() == "!!null" || k.ShortTag() == "!!merge" {
			p.at(k, "a key has to be text")
			continue
		}
		visit(k, n.Content[i+1])
	}
}

// fields calls the function of each key that is there.
func (p *parser) fields(n *yaml.Node, what string, known map[string]func(*yaml.Node)) {
	seen := map[string]*yaml.Node{}
	p.pairs(n, what, func(k, v *yaml.Node) {
		set, ok := known[k.Value]
		switch first := seen[k.Value]; {
		case !ok:
			p.at(k, "unknown key %q%s", k.Value, didYouMean(k.Value, slices.Sorted(maps.Keys(known))))
		case first != nil:
			p.at(k, "key %q is there already, in line %d", k.Value, first.Line)
		default:
			seen[k.Value] = k
			set(v)
		}
	})
}

var labelName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// named calls add for each name in lower case; seen may be of several mappings.
func (p *parser) named(n *yaml.Node, what string, seen map[string]*yaml.Node, add func(string, *yaml.Node)) {
	p.pairs(n, "the mapping of each "+what, func(k, v *yaml.Node) {
		name := strings.ToLower(k.Value)
		switch first := seen[name]; {
		case !labelName.MatchString(name):
			p.at(k, "%s %q: a name has 1 to 63 of a-z 0-9 . _ - and begins with a letter or digit", what, k.Value)
		case first != nil:
			p.at(k, "%s %q: the name is taken, by %q in line %d", what, k.Value, first.Value, first.Line)
		default:
			seen[name] = k
			add(name, v)
		}
	})
}

func (p *parser) text(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode || n.ShortTag() == "!!null" || n.Value == "" {
		p.at(n, "this has to be text")
		return ""
	}
	return n.Value
}

func (p *parser) oneOf(n *yaml.Node, allowed []string) string {
	s := p.text(n)
	if s != "" && !slices.Contains(allowed, s) {
		p.at(n, "%q is none of %s%s", s, strings.Join(allowed, ", "), didYouMean(s, allowed))
	}
	return s
}

func (p *parser) sum(n *yaml.Node) string {
	s := strings.ToLower(p.text(n))
	if s != "" && !sha256Hex.MatchString(s) {
		p.at(n, "a SHA-256 has 64 hexadecimal digits")
	}
	if s == nothing {
		p.at(n, "this is the SHA-256 of an empty file")
	}
	return s
}

var platform = regexp.MustCompile(`^[a-z0-9]{1,32}$`)

func (p *parser) platform(n *yaml.Node) string {
	s := p.text(n)
	if s != "" && !platform.MatchString(s) {
		p.at(n, "%q is no name such as linux or amd64", s)
	}
	return s
}

func (p *parser) image(label string, n *yaml.Node, sizes map[string]*yaml.Node) Image {
	img := Image{Label: label, Compression: None, Seed: SeedFAT}
	before := len(p.problems)
	p.fields(n, "an image", map[string]func(*yaml.Node){
		"source": func(n *yaml.Node) {
			var err error
			if img.Source = p.text(n); img.Source == "" {
				return
			}
			if img.Source, err = checkSource(img.Source, p.dir); err != nil {
				p.at(n, "%v", err)
			}
		},
		"sha256":       func(n *yaml.Node) { img.SHA256 = p.sum(n) },
		"image_sha256": func(n *yaml.Node) { img.ImageSHA256 = p.sum(n) },
		"format":       func(n *yaml.Node) { img.Format = p.oneOf(n, formats) },
		"compression":  func(n *yaml.Node) { img.Compression = p.oneOf(n, compressions) },
		"seed":         func(n *yaml.Node) { img.Seed = p.oneOf(n, seeds) },
		"os":           func(n *yaml.Node) { img.OS = p.platform(n) },
		"arch":         func(n *yaml.Node) { img.Arch = p.platform(n) },
		"size":         func(n *yaml.Node) { img.Size, sizes[label] = strings.ToLower(p.text(n)), n },
		"max_size":     func(n *yaml.Node) { img.MaxBytes = p.bytes(n) },
	})
	if len(p.problems) > before {
		return img
	}
	for _, required := range []struct{ key, value, why string }{
		{"source", img.Source, "a URL or a path"},
		{"sha256", img.SHA256, "what sha256sum says of the file at the source"},
		{"format", img.Format, "it is never guessed: qcow2 or raw"},
		{"os", img.OS, "such as linux, freebsd or illumos"},
		{"arch", img.Arch, "such as amd64 or arm64"},
	} {
		if required.value == "" {
			p.at(n, "image %q needs %s: %s", label, required.key, required.why)
		}
	}
	return img
}

func (p *parser) size(n *yaml.Node) Size {
	var s Size
	p.fields(n, "a size", map[string]func(*yaml.Node){
		"cpus": func(n *yaml.Node) {
			var err error
			if s.CPUs, err = strconv.Atoi(n.Value); err != nil || n.Kind != yaml.ScalarNode || s.CPUs < 1 || s.CPUs > 4096 {
				p.at(n, "cpus is a number from 1 on")
			}
		},
		"memory": func(n *yaml.Node) { s.MemoryBytes = p.bytes(n) },
		"disk":   func(n *yaml.Node) { s.DiskBytes = p.bytes(n) },
	})
	return s
}

var units = map[string]int64{"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

var bytesText = regexp.MustCompile(`^([0-9]{1,18}) ?([A-Za-z]*)$`)

func (p *parser) bytes(n *yaml.Node) int64 {
	v, err := ParseBytes(n.Value)
	if err != nil || n.Kind != yaml.ScalarNode {
		p.at(n, "a number of bytes is written like 512MiB or 20GiB")
	}
	return v
}

// ParseBytes reads a positive number of bytes as catalogues have them: 512MiB,
// 20GiB. The error wraps ErrInvalid.
func ParseBytes(text string) (int64, error) {
	if m := bytesText.FindStringSubmatch(text); m != nil {
		v, err := strconv.ParseInt(m[1], 10, 64)
		unit, ok := units[m[2]]
		if err == nil && ok && v > 0 && v <= math.MaxInt64/unit {
			return v * unit, nil
		}
	}
	return 0, fmt.Errorf("%w: number of bytes %q", ErrInvalid, text)
}
