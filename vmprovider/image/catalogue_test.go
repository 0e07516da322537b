package image_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/vmprovider/image"
)

func TestCatalogue(t *testing.T) {
	c, err := image.ReadFile("testdata/good.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, label := range []string{"", "debian-12", "DEBIAN-12", "Linux"} {
		got, err := c.Resolve(label)
		if err != nil {
			t.Fatal(err)
		}
		want := image.Choice{Image: image.Image{
			Label: "debian-12", Source: "https://images.example.org/debian-12-genericcloud-amd64.qcow2",
			SHA256: strings.Repeat("0123456789abcdef", 4), Format: image.QCOW2, Compression: image.None, Seed: image.SeedFAT, OS: "linux", Arch: "amd64", Size: "small",
		}, Size: image.Size{CPUs: 1, MemoryBytes: 512 << 20}}
		if got != want {
			t.Errorf("%q is %+v, want %+v", label, got, want)
		}
	}
	got, err := c.Resolve("illumos")
	if err != nil {
		t.Fatal(err)
	}
	path, err := filepath.Abs("testdata/images/illumos.raw.zst")
	if i := got.Image; err != nil || i.Source != path || i.Seed != image.SeedISO || i.MaxBytes != 20<<30 || i.Compression != image.Zstd || got.Size != (image.Size{}) {
		t.Errorf("%+v, %v", i, err)
	}
	if _, err := c.Resolve("debain"); !errors.Is(err, image.ErrUnknown) || !strings.Contains(err.Error(), `did you mean "debian"?`) {
		t.Errorf("an unknown label: %v", err)
	}
	if s, err := c.Size("LARGE"); err != nil || s.DiskBytes != 40<<30 {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := c.Size("larg"); !errors.Is(err, image.ErrUnknown) || !strings.Contains(err.Error(), `"large"`) {
		t.Errorf("an unknown size: %v", err)
	}
}

func TestBrokenCatalogue(t *testing.T) {
	_, err := image.ReadFile("testdata/broken.yaml")
	if !errors.Is(err, image.ErrInvalid) {
		t.Fatal(err)
	}
	want := []string{
		`1:1: unknown key "default_lable" (did you mean "default_label"?)`,
		`2:16: default_label: unknown label "debain"`,
		`4:6: alias "a" leads in a circle: a → b → a`,
		`5:6: alias "b" leads in a circle: b → a → b`,
		`6:6: alias "c": unknown label "debian-11" (did you mean "debian-12"?)`,
		`9:12: unknown key "cpu" (did you mean "cpus"?)`,
		`9:28: a number of bytes is written like 512MiB`,
		`13:13: a SHA-256 has 64`,
		`14:13: "vmdk" is none of qcow2, raw`,
		`15:18: "xy" is none of none, xz, zstd, gz (did you mean "xz"?)`,
		`18:11: unknown size "smal" (did you mean "small"?)`,
		`19:3: image "Debian-12": the name is taken, by "debian-12" in line 11`,
		`20:3: image "c": the name is taken, by "c" in line 6`,
		`21:3: image "../x": a name has`,
		`22:19: credentials do not belong into a URL`,
		`23:9: image "bare" needs sha256`,
		`23:9: image "bare" needs format`,
		`23:9: image "bare" needs os`,
		`23:9: image "bare" needs arch`,
		`24:18: a source is an http or https URL or a path, not "ftp"`,
	}
	got := strings.Split(err.Error(), "\n")
	for i, w := range want {
		if i >= len(got) || !strings.HasPrefix(got[i], "testdata/broken.yaml:"+w) {
			t.Fatalf("no problem %q in\n%s", w, strings.Join(got, "\n"))
		}
	}
	if len(got) != len(want) {
		t.Errorf("further problems: %q", got[len(want):])
	}
}

func TestCatalogueText(t *testing.T) {
	for text, want := range map[string]string{
		"":                                "1:1: the catalogue is empty",
		"images: {}":                      "1:1: there are no images",
		"[]":                              "1:1: the catalogue has to be a mapping",
		"a: 1\n---\nb: 1\n":               "2:1: a second YAML document",
		"images:\n\t- x":                  "2:",
		"images:\n  ä\xff: 1":             "2:5: the file is not valid UTF-8",
		"images: &a {x: *a}":              "",
		"default_label: [x]\nimages: 1":   "1:16: this has to be text",
		"images: {x: {source: ../../up}}": "1:22: a relative path cannot leave",
	} {
		_, err := image.Parse("c.yaml", []byte(text))
		if !errors.Is(err, image.ErrInvalid) || !strings.HasPrefix(err.Error(), "c.yaml:"+want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
	if _, err := image.Parse("c.yaml", make([]byte, 2<<20)); !errors.Is(err, image.ErrInvalid) {
		t.Errorf("a large file: %v", err)
	}
}

// FuzzCatalogue: whatever the bytes, problems have places in the file, and of
// what is accepted every label leads to an image that no store refuses to name.
func FuzzCatalogue(f *testing.F) {
	for _, name := range []string{"good.yaml", "broken.yaml"} {
		data, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("images: &a {x: *a}"))
	f.Add([]byte("images: {<<: {x: {}}, ? [1] : 2}\n---\n"))
	dir := f.TempDir()
	s, err := image.Open(dir, image.Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := image.Parse("c.yaml", data)
		if err != nil {
			var e *image.CatalogueError
			if !errors.As(err, &e) || len(e.Problems) == 0 {
				t.Fatal(err)
			}
			for _, p := range e.Problems {
				if p.Line < 1 || p.Column < 1 || p.Line > bytes.Count(data, []byte("\n"))+bytes.Count(data, []byte("\r"))+strings.Count(string(data), "\u0085")+strings.Count(string(data), "\u2028")+strings.Count(string(data), "\u2029")+2 {
					t.Fatalf("place %d:%d in %q", p.Line, p.Column, data)
				}
			}
			return
		}
		for _, label := range append(c.Labels(), keys(c.Aliases)...) {
			choice, err := c.Resolve(strings.ToUpper(label))
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := c.Images[choice.Image.Label]; !ok || !filepath.IsAbs(choice.Image.Source) && !strings.HasPrefix(choice.Image.Source, "http") {
				t.Fatalf("%q is %+v", label, choice)
			}
			if _, err := s.Pin(t.Context(), choice.Image); !errors.Is(err, image.ErrNotFound) {
				t.Fatal(err)
			}
		}
		if c.DefaultLabel != "" {
			if _, err := c.Resolve(""); err != nil {
				t.Fatal(err)
			}
		}
		if again, err := image.Parse("c.yaml", data); err != nil || !reflect.DeepEqual(c, again) {
			t.Fatal("it is not the same twice", err)
		}
	})
}

func keys(m map[string]string) (out []string) {
	for k := range m {
		out = append(out, k)
	}
	return out
}
