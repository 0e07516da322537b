// Package forges opens the forges of a daemon from a file, for programs whose
// operators say in a file what forges there are; docs/forges.md describes it.
//
//	file, err := forges.ReadFile("forges.yaml")
//	set, err := file.Open(ctx, forges.Options{Logger: log})
//	defer set.Close()
//	cfg.Forges, cfg.ReportedElsewhere = set.Forges(), set.OwnedElsewhere()
package forges

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/daemon/internal/operator"
)

// ErrInvalid: a file of forges is wrong.
var ErrInvalid = errors.New("forges: invalid")

// File is what a file of forges says.
type File struct {
	forges []entry // by name
}

// entry is one forge of a file. Secrets are in files of their own.
type entry struct {
	name, file string

	Driver            string           `yaml:"driver"`
	URL               string           `yaml:"url"`
	APIURL            string           `yaml:"api_url"`
	AppID             int64            `yaml:"app_id"`
	AppKeyFile        string           `yaml:"app_key_file"`
	TokenFile         string           `yaml:"token_file"`
	WebhookSecretFile string           `yaml:"webhook_secret_file"`
	Allow             []string         `yaml:"allow"`
	AllowAll          bool             `yaml:"allow_all"`
	Root              string           `yaml:"root"`
	StatusDir         string           `yaml:"status_dir"`
	Poll              string           `yaml:"poll"`
	OwnedElsewhere    bool             `yaml:"owned_elsewhere"`
	Serve             string           `yaml:"serve"`
	Plugin            *operator.Plugin `yaml:"plugin"`
}

// document is the whole file.
type document struct {
	Forges map[string]*entry `yaml:"forges"`
}

// ReadFile reads a file of forges. Paths are relative to the file's directory. What
// is wrong is an error that wraps ErrInvalid, or what the system says, and names all
// of it.
func ReadFile(path string) (*File, error) {
	data, err := operator.Read(path, ErrInvalid)
	if err != nil {
		return nil, err
	}
	return parse(path, data)
}

var forgeName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

func parse(path string, data []byte) (*File, error) {
	var doc document
	if err := operator.Parse(path, data, &doc, ErrInvalid); err != nil {
		return nil, err
	}
	if len(doc.Forges) == 0 {
		return nil, fmt.Errorf("%w: %s: there are no forges", ErrInvalid, path)
	}
	out := &File{}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(doc.Forges)) {
		e := doc.Forges[name]
		if e == nil {
			e = &entry{}
		}
		e.name, e.file = name, path
		for _, err := range e.check() {
			errs = append(errs, fmt.Errorf("%s: forge %s: %w", path, name, err))
		}
		out.forges = append(out.forges, *e)
	}
	served := map[string]string{}
	for _, e := range out.forges {
		at := e.Serve
		if other := served[at]; at != "" && other != "" {
			errs = append(errs, fmt.Errorf("%s: forge %s: %s is served at %s already", path, e.name, other, at))
		}
		served[at] = e.name
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, errors.Join(errs...))
	}
	return out, nil
}

// keysOf are the keys that only some drivers have.
var keysOf = map[string]string{
	"url": "github forgejo gitlab", "api_url": "github", "app_id": "github", "app_key_file": "github", "token_file": "github forgejo gitlab",
	"webhook_secret_file": "github forgejo gitlab plugin", "poll": "github forgejo gitlab plugin", "root": "local", "status_dir": "local", "plugin": "plugin",
}

// check finds what is wrong with a forge by itself.
func (e *entry) check() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !forgeName.MatchString(e.name) {
		bad("a name is up to 63 of a-z 0-9 . _ -")
	}
	kind := e.kind()
	if kind == "" {
		bad("driver %q: want github, forgejo (for Gitea too), gitlab, local, command, grpc+unix:PATH or grpc+tls:HOST:PORT", e.Driver)
		return errs
	}
	given := map[string]bool{
		"url": e.URL != "", "api_url": e.APIURL != "", "app_id": e.AppID != 0, "app_key_file": e.AppKeyFile != "", "token_file": e.TokenFile != "",
		"webhook_secret_file": e.WebhookSecretFile != "", "poll": e.Poll != "", "root": e.Root != "", "status_dir": e.StatusDir != "", "plugin": e.Plugin != nil,
	}
	for _, key := range slices.Sorted(maps.Keys(given)) {
		if given[key] && !slices.Contains(strings.Fields(keysOf[key]), kind) {
			bad("%s is none of driver %s", key, e.Driver)
		}
	}
	switch kind {
	case "github":
		app := e.AppID != 0 || e.AppKeyFile != ""
		switch {
		case app && (e.AppID == 0 || e.AppKeyFile == ""):
			bad("app_id and app_key_file go together")
		case app == (e.TokenFile != ""):
			bad("want an App (app_id and app_key_file) or a token (token_file)")
		}
	case "forgejo", "gitlab":
		if e.URL == "" {
			bad("url is missing: what people open, such as https://codeberg.org")
		}
		if e.TokenFile == "" {
			bad("token_file is missing")
		}
	case "local":
		if e.Root == "" {
			bad("root is missing: the directory of the repositories")
		}
	case "plugin":
		errs = append(errs, cmp.Or(e.Plugin, &operator.Plugin{}).Check(e.Driver, "driver")...)
	}
	for key, u := range map[string]string{"url": e.URL, "api_url": e.APIURL} {
		if p, err := url.Parse(u); u != "" && (err != nil || p.Scheme != "https" && p.Scheme != "http" || p.Host == "" || p.User != nil) {
			bad("%s %q: want one like https://forge.example.org, without credentials", key, u)
		}
	}
	if every := e.poll(); e.Poll != "" && e.Poll != "off" && every < time.Second {
		bad("poll %q: want off, or a time of at least 1s, such as 10m", e.Poll)
	}
	if e.AllowAll && len(e.Allow) > 0 {
		bad("allow and allow_all exclude each other")
	}
	if e.OwnedElsewhere && (e.WebhookSecretFile != "" || e.AllowAll || len(e.Allow) > 0 || e.Serve != "") {
		bad("owned_elsewhere: webhook_secret_file, allow, allow_all and serve are the owner's")
	}
	if e.Serve != "" && CheckListen(e.Serve) != nil {
		bad("serve %q: want unix:PATH or HOST:PORT", e.Serve)
	}
	for _, a := range e.Allow {
		if a == "" || strings.Trim(a, "/") != a || strings.ContainsAny(a, "* ") {
			bad("allow %q: want an owner or owner/name", a)
		}
	}
	return errs
}

// poll is how often repositories are looked at, as integration.Instance has it.
func (e *entry) poll() time.Duration {
	if e.Poll == "off" {
		return -1
	}
	every, _ := time.ParseDuration(e.Poll) // 0 is refused by check, and otherwise the default
	return every
}

// kind is github, forgejo, gitlab, local, plugin or nothing.
func (e *entry) kind() string {
	switch {
	case slices.Contains([]string{"github", "forgejo", "gitlab", "local"}, e.Driver):
		return e.Driver
	case e.Driver == "gitea":
		return "forgejo"
	case operator.IsPlugin(e.Driver):
		return "plugin"
	}
	return ""
}

// socket is unix:PATH with the path beside the file; other addresses stay.
func (e *entry) socket(at string) string {
	if file, ok := strings.CutPrefix(at, "unix:"); ok {
		return "unix:" + operator.Beside(e.file, file)
	}
	return at
}

// CheckListen says what is wrong with an address that a forge is served at: want
// unix:PATH or HOST:PORT.
func CheckListen(at string) error {
	file, unix := strings.CutPrefix(at, "unix:")
	if _, _, err := net.SplitHostPort(at); unix && file == "" || !unix && err != nil {
		return fmt.Errorf("%w: %q: want unix:PATH or HOST:PORT", ErrInvalid, at)
	}
	return nil
}
