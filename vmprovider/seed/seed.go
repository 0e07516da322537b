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
// console, in lines that begin with "solstice:"; the agent's log follows. Where
// there is no console to open, all of it goes to the script's own output. A
// download that brings nothing for half a minute is ended and tried again.
//
// A guest needs: something that reads a NoCloud seed and runs its user-data as
// root once the network is up, the utilities of POSIX, one of the programs named
// above, and one of sha256sum, sha256, digest, shasum or openssl.
package seed

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
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
	patience     int    // seconds without a byte, after which it ends a download
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
	if o.patience == 0 {
		o.patience = 30
	}
}

// Build returns a seed disk, of up to 1 MiB, which holds the enrolment token. An
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

const label = `[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?`

var (
	platformForm = regexp.MustCompile(`^[a-z0-9]+/[a-z0-9]+$`)
	instanceForm = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]{0,251}[a-zA-Z0-9])?$`)
	hostnameForm = regexp.MustCompile(`^` + label + `(\.` + label + `)*$`)
	addressForm  = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,63}(\.[a-zA-Z0-9_-]{1,63})*\.?$`) // what resolvers take is more than RFC 1123 has
	numberForm   = regexp.MustCompile(`(^|\.)[0-9]+\.?$`)
	tokenForm    = regexp.MustCompile(`^[!-~]+$`)
	urlForm      = regexp.MustCompile(`^[a-zA-Z0-9:/?#\[\]@!$&()*+,;=._~%-]+$`)
)

// maxScript bounds user-data, in bytes: half of the disk.
const maxScript = fatSize / 2

// checkAddress says what is wrong with where a guest is to connect to; port may
// be empty for a URL.
func checkAddress(host, port string) error {
	if ip, err := netip.ParseAddr(host); err == nil {
		if ip.IsUnspecified() || ip.IsMulticast() {
			return fmt.Errorf("nobody can be reached at %s", host)
		}
	} else if len(host) > 253 || !addressForm.MatchString(host) || numberForm.MatchString(host) {
		return fmt.Errorf("%q is no host name and no IP address", host)
	}
	if n, err := strconv.ParseUint(port, 10, 16); port != "" && (err != nil || n == 0) {
		return fmt.Errorf("port %q: want 1 to 65535", port)
	}
	return nil
}

func check(b vmprovider.Bootstrap) error {
	if len(b.Contacts) == 0 {
		return invalid("no contacts")
	}
	for i, c := range b.Contacts {
		host, port, err := net.SplitHostPort(c)
		if err != nil || port == "" || !urlForm.MatchString(c) {
			return invalid("contact %d, %q: want HOST:PORT", i+1, c)
		}
		if err := checkAddress(host, port); err != nil {
			return invalid("contact %d, %q: %v", i+1, c, err)
		}
	}
	if len(b.CA) == 0 {
		return invalid("no CA: the agent could not tell who answers")
	}
	if !x509.NewCertPool().AppendCertsFromPEM(b.CA) { // as the agent reads it
		return invalid("the CA, of %d bytes, holds no certificate in PEM", len(b.CA))
	}
	if !tokenForm.MatchString(b.Token) {
		return invalid("the enrolment token is empty or not of printable ASCII")
	}
	if !instanceForm.MatchString(b.InstanceID) {
		return invalid("instance ID %q: want up to 253 of A-Z a-z 0-9 . -", b.InstanceID)
	}
	if len(b.Hostname) > 253 || !hostnameForm.MatchString(b.Hostname) {
		return invalid("host name %q: want words of up to 63 of A-Z a-z 0-9 -, with dots between them, up to 253 in all", b.Hostname)
	}
	u, err := url.Parse(b.RunnerURL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" || !urlForm.MatchString(b.RunnerURL) {
		return invalid("runner URL %q: want http://HOST/PATH or https://HOST/PATH", b.RunnerURL)
	}
	if u.User != nil {
		return invalid("the runner URL has credentials, which all of the guest's users could see")
	}
	if err := checkAddress(u.Hostname(), u.Port()); err != nil {
		return invalid("runner URL %q: %v", b.RunnerURL, err)
	}
	if len(b.AgentSHA256) == 0 {
		return invalid("no SHA-256 of an agent")
	}
	for platform, sum := range b.AgentSHA256 {
		if !platformForm.MatchString(platform) {
			return invalid("agent of %q: want OS/ARCH", platform)
		}
		if raw, err := hex.DecodeString(sum); err != nil || len(raw) != 32 {
			return invalid("agent of %s: %q is not a SHA-256 in hex", platform, sum)
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
	script := strings.NewReplacer(
		"@DIR@", shellQuoted(o.dir), "@CONSOLE@", shellQuoted(o.console), "@WAITS@", o.waits, "@PATIENCE@", strconv.Itoa(o.patience),
		"@URL@", shellQuoted(strings.TrimSuffix(b.RunnerURL, "/")), "@SUMS@\n", sums.String(), "@BOOTSTRAP@", string(conf),
	).Replace(template)
	if len(script) > maxScript {
		return nil, invalid("user-data has %d bytes, of which %d are contacts, CA and token, and %d sums of agents; up to %d fit", len(script), len(conf), sums.Len(), maxScript)
	}
	return []byte(script), nil
}

func shellQuoted(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
