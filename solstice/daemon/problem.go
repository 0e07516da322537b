package daemon

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"strconv"
	"strings"
	"syscall"
	"unicode"
)

// Problem is an error for the person who starts a program.
type Problem struct {
	What   string // what failed: "cannot open the database"
	Err    error  // why; may be nil
	Advice string // what to do; may be empty
}

func (p *Problem) Error() string {
	if p.Err == nil {
		return p.What
	}
	return p.What + ": " + p.Err.Error()
}

func (p *Problem) Unwrap() error { return p.Err }

// Render writes an error as a diagnostic: what failed, why, what to do. Where a
// [Problem] has no advice, or there is none, the advice is [Advice]'s. What is
// written can be shown on a terminal: of what came from outside (names, answers
// of servers), control characters and those that turn the direction of text are
// written as escapes.
func Render(w io.Writer, err error) {
	what, why, advice := err.Error(), "", Advice(err)
	if p, ok := errors.AsType[*Problem](err); ok {
		what = p.What
		if p.Err != nil {
			why = p.Err.Error()
		}
		if p.Advice != "" {
			advice = p.Advice
		}
	}
	// Nothing is left to do about a stderr that cannot be written to.
	for _, part := range []struct{ label, text string }{{"error: ", what}, {"  why: ", why}, {"  try: ", advice}} {
		if part.text != "" {
			_, _ = fmt.Fprintln(w, part.label+printable(part.text))
		}
	}
}

// printable indents all lines but the first one and leaves empty ones away.
func printable(text string) string {
	var lines []string
	for l := range strings.Lines(text) {
		if l = strings.TrimRight(l, " \t\r\n"); l != "" {
			lines = append(lines, l)
		}
	}
	var b strings.Builder
	for _, r := range strings.ToValidUTF8(strings.Join(lines, "\n       "), "\uFFFD") {
		switch {
		case r == '\n', r == '\t', unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return b.String()
}

// Advice says what a person can do about an error of the network, TLS or the
// file system; "" when it does not know.
func Advice(err error) string {
	if d, ok := errors.AsType[*net.DNSError](err); ok {
		return fmt.Sprintf("the name %s does not resolve: check its spelling and this machine's DNS", d.Name)
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "the server's certificate is signed by an authority this program does not trust: pass that authority's certificate"
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return "the server's certificate is for another name: connect to the name it is made for"
	}
	if c, ok := errors.AsType[x509.CertificateInvalidError](err); ok && c.Reason == x509.Expired {
		return "the certificate is expired or not valid yet: renew it, or correct this machine's clock"
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return "the server does not speak TLS there: check the port, or use the address without TLS"
	}
	for _, known := range []struct {
		is     error
		advice string
	}{
		{syscall.ECONNREFUSED, "nothing listens at that address: start the server, or correct host and port"},
		{syscall.EADDRINUSE, "another program listens at that address: stop it, or choose another port"},
		{syscall.EADDRNOTAVAIL, "this machine does not have that address: listen on one that it has"},
		{syscall.EHOSTUNREACH, "there is no route to that host: check the address and the network"},
		{syscall.ENETUNREACH, "there is no route to that network: check the address and the network"},
		{syscall.ENOSPC, "the disk is full: make room, or use another directory"},
		{syscall.EROFS, "the file system is read-only: use another directory"},
		{fs.ErrPermission, "this user may not do that: check owner and mode, or run as another user"},
		{fs.ErrNotExist, "the file does not exist: check the path"},
	} {
		if errors.Is(err, known.is) {
			return known.advice
		}
	}
	if n, ok := errors.AsType[net.Error](err); ok && n.Timeout() {
		return "there was no answer in time: check the address, and firewalls on the way"
	}
	return ""
}
