// Package seed makes the disk from which a fresh virtual machine learns what it
// is for: a NoCloud seed (https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html)
// with the volume label CIDATA, which cloud-init, FreeBSD's nuageinit and
// illumos's metadata-agent read.
//
// It holds two files. meta-data has an instance-id, unique per machine, and
// local-hostname. user-data is a script for a POSIX shell: it downloads the agent
// for its system with curl, wget, fetch or ftp, whatever there is, compares its
// SHA-256 with the one that it was given, writes contacts, authority and enrolment
// token to a file that only root can read, and starts the agent on it, which powers
// the machine off in the end. What it does and what goes wrong it says on the
// console, in lines that begin with "solstice:".
//
// A guest needs: something that reads a NoCloud seed and runs its user-data as
// root once the network is up, one of the programs named above, and one of
// sha256sum, sha256, digest, shasum or openssl.
package seed

import (
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	_ "embed"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// Label is the volume label of a seed.
const Label = "CIDATA"

// Format is the file system of a seed.
type Format string

// Formats.
const (
	FAT Format = "fat" // for a disk; the default
	ISO Format = "iso" // ISO 9660 with Rock Ridge and Joliet names, for a CD-ROM drive
)

// Options of a seed; the zero value is the default.
type Options struct {
	Format Format

	dir, console string // where the script works, and speaks; tests have their own
	waits        string // between its tries, in seconds
}

func (o *Options) fill() {
	if o.Format == "" {
		o.Format = FAT
	}
	if o.dir == "" {
		o.dir = "/var/lib/solstice"
	}
	if o.console == "" {
		o.console = "/dev/console"
	}
	if o.waits == "" {
		o.waits = "1 2 4 8 15 15 15 15 15 15"
	}
}

// Build returns a seed disk, of about 1 MiB, which holds the enrolment token. An
// error that the bootstrap or the options are to blame for wraps
// vmprovider.ErrInvalid.
func Build(b vmprovider.Bootstrap, o Options) ([]byte, error) {
	o.fill()
	script, err := userData(b, o)
	if err != nil {
		return nil, err
	}
	files := []file{{"meta-data", metaData(b)}, {"user-data", script}}
	switch o.Format {
	case FAT:
		return buildFAT(files)
	case ISO:
		return buildISO(files)
	}
	return nil, invalid("unknown format %q, want %s or %s", o.Format, FAT, ISO)
}

type file struct {
	name    string
	content []byte
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: seed: %s", vmprovider.ErrInvalid, fmt.Sprintf(format, args...))
}

// metaData is YAML, of which JSON is a part.
func metaData(b vmprovider.Bootstrap) []byte {
	return fmt.Appendf(nil, "instance-id: %s\nlocal-hostname: %s\n", quoted(b.InstanceID), quoted(b.Hostname))
}

func quoted(s string) string {
	j, _ := json.Marshal(s) // of a string it does not fail
	return string(j)
}

var (
	platformForm = regexp.MustCompile(`^[a-z0-9]+/[a-z0-9]+$`)
	nameForm     = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]{0,251}[a-zA-Z0-9])?$`)
	tokenForm    = regexp.MustCompile(`^[!-~]+$`)
	urlForm      = regexp.MustCompile(`^[a-zA-Z0-9:/?#\[\]@!$&()*+,;=._~%-]+$`)
)

func check(b vmprovider.Bootstrap) error {
	if len(b.Contacts) == 0 {
		return invalid("no contacts")
	}
	for _, c := range b.Contacts {
		host, port, err := net.SplitHostPort(c)
		n, perr := strconv.ParseUint(port, 10, 16)
		if errors.Join(err, perr) != nil || host == "" || n == 0 || !urlForm.MatchString(c) {
			return invalid("contact %q is not HOST:PORT", c)
		}
	}
	if block, _ := pem.Decode(b.CA); block == nil || block.Type != "CERTIFICATE" {
		return invalid("the authority is no certificate in PEM")
	}
	if !tokenForm.MatchString(b.Token) {
		return invalid("the enrolment token is empty or not of printable ASCII")
	}
	if !nameForm.MatchString(b.InstanceID) {
		return invalid("instance ID %q: want up to 253 of A-Z a-z 0-9 . -", b.InstanceID)
	}
	if !nameForm.MatchString(b.Hostname) {
		return invalid("host name %q: want up to 253 of A-Z a-z 0-9 . -", b.Hostname)
	}
	u, err := url.Parse(b.RunnerURL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" || !urlForm.MatchString(b.RunnerURL) {
		return invalid("runner URL %q: want http://HOST/PATH or https://HOST/PATH", b.RunnerURL)
	}
	if u.User != nil {
		return invalid("the runner URL has credentials, which all of the guest's users could see")
	}
	if len(b.AgentSHA256) == 0 {
		return invalid("no SHA-256 of an agent")
	}
	for platform, sum := range b.AgentSHA256 {
		if raw, err := hex.DecodeString(sum); err != nil || len(raw) != 32 || !platformForm.MatchString(platform) {
			return invalid("agent of %q: %q is not a SHA-256 in hex", platform, sum)
		}
	}
	return nil
}

//go:embed user-data.sh
var template string

// userData is the script. All that it is given is checked, and quoted
// nevertheless.
func userData(b vmprovider.Bootstrap, o Options) ([]byte, error) {
	if err := check(b); err != nil {
		return nil, err
	}
	conf, err := json.Marshal(struct {
		Contacts []string `json:"contacts"`
		CA       []byte   `json:"ca"`
		Token    string   `json:"token"`
	}{b.Contacts, b.CA, b.Token})
	if err != nil {
		return nil, invalid("%v", err)
	}
	var sums strings.Builder
	for _, platform := range slices.Sorted(maps.Keys(b.AgentSHA256)) {
		fmt.Fprintf(&sums, "\t%s) want=%s ;;\n", platform, strings.ToLower(b.AgentSHA256[platform]))
	}
	return []byte(strings.NewReplacer(
		"@DIR@", shellQuoted(o.dir), "@CONSOLE@", shellQuoted(o.console), "@WAITS@", o.waits,
		"@URL@", shellQuoted(strings.TrimSuffix(b.RunnerURL, "/")), "@SUMS@\n", sums.String(), "@BOOTSTRAP@", string(conf),
	).Replace(template)), nil
}

func shellQuoted(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
