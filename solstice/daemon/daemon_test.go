package daemon

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/solstice/agent"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestExitCodes(t *testing.T) {
	boom := errors.New("boom")
	for _, c := range []struct {
		name   string
		run    func(context.Context) error
		signal bool
		code   int
		stderr string
	}{
		{"success", func(context.Context) error { return nil }, false, 0, ""},
		{"failure", func(context.Context) error { return boom }, false, 1, "error: boom\n"},
		{"own code", func(context.Context) error { return fmt.Errorf("x: %w", &ExitError{Code: 2, Err: boom}) }, false, 2, "error: boom\n"},
		{"own code, silent", func(context.Context) error { return &ExitError{Code: 130} }, false, 130, ""},
		{"cancelled without a signal", func(context.Context) error { return context.Canceled }, false, 1, "error: context canceled\n"},
		{"signal", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, true, 0, ""},
		{"signal, failed", func(ctx context.Context) error { <-ctx.Done(); return boom }, true, 1, "error: boom\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			signals := make(chan os.Signal, 2)
			if c.signal {
				signals <- syscall.SIGTERM
			}
			var stderr bytes.Buffer
			code := supervise(c.run, signals, &stderr, func(int) { t.Error("exited at once") })
			if code != c.code || stderr.String() != c.stderr {
				t.Errorf("code %d, stderr %q; want %d, %q", code, stderr.String(), c.code, c.stderr)
			}
		})
	}
}

func TestSecondSignalExitsAtOnce(t *testing.T) {
	signals, exited := make(chan os.Signal, 2), make(chan int)
	done := make(chan int)
	release := make(chan struct{})
	go func() {
		done <- supervise(func(ctx context.Context) error {
			<-ctx.Done()
			signals <- os.Interrupt // while winding down
			<-release
			return nil
		}, signals, io.Discard, func(code int) { exited <- code })
	}()
	signals <- syscall.SIGTERM
	if code := <-exited; code != ExitInterrupted {
		t.Errorf("exit code %d, want %d", code, ExitInterrupted)
	}
	close(release)
	<-done
}

func TestRender(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		want string
	}{
		{"plain", errors.New("boom"), "error: boom\n"},
		{"wrapped problem", fmt.Errorf("start: %w", &Problem{What: "cannot eat", Err: errors.New("a\nb"), Advice: "sleep"}), "error: cannot eat\n  why: a\n       b\n  try: sleep\n"},
		{
			"text from outside", &Problem{What: "cannot find \x1b]0;x\a\u202e\u009b2J'\x00ü\xff", Err: errors.New("\r\na\tb\x1b[2J\r\n\nc\r\x7fd\n"), Advice: "look"},
			"error: cannot find \\x1b]0;x\\a\\u202e\\u009b2J'\\x00ü\uFFFD\n  why: a\tb\\x1b[2J\n       c\\r\\x7fd\n  try: look\n",
		},
		{"own advice wins", &Problem{What: "w", Err: syscall.ECONNREFUSED, Advice: "mine"}, "error: w\n  why: connection refused\n  try: mine\n"},
	} {
		var buf bytes.Buffer
		Render(&buf, c.err)
		if buf.String() != c.want {
			t.Errorf("%s: got %q, want %q", c.name, buf.String(), c.want)
		}
	}
}

// TestAdviceForRealErrors makes each error happen.
func TestAdviceForRealErrors(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := lis.Addr().String()
	_, inUse := net.Listen("tcp", addr)
	_ = lis.Close()
	_, refused := net.Dial("tcp", addr)

	ca, err := LoadOrCreateCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	trusting := x509.NewCertPool()
	trusting.AppendCertsFromPEM(ca.PEM())
	handshake := func(server func(net.Conn), client *tls.Config) error {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			if c, err := lis.Accept(); err == nil {
				server(c)
				_ = c.Close()
			}
		}()
		c, err := net.Dial("tcp", lis.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		err = tls.Client(c, client).HandshakeContext(t.Context())
		_, _ = c.Close(), lis.Close()
		<-done
		return err
	}
	ours := func(c net.Conn) { _ = tls.Server(c, ca.ServerConfig()).HandshakeContext(t.Context()) }
	plain := func(c net.Conn) {
		_, _ = io.WriteString(c, "220 smtp.example.com ready\r\n")
		_, _ = io.Copy(io.Discard, c) // until the client gives up
	}

	for _, c := range []struct {
		err  error
		want string
	}{
		{&net.OpError{Err: &net.DNSError{Name: "db.invalid", IsNotFound: true}}, "db.invalid does not resolve"},
		{inUse, "another program listens"},
		{refused, "nothing listens"},
		{handshake(ours, &tls.Config{ServerName: agent.ServerName}), "not trust"},
		{handshake(ours, &tls.Config{ServerName: "other", RootCAs: trusting}), "another name"},
		{handshake(plain, &tls.Config{ServerName: agent.ServerName, RootCAs: trusting}), "does not speak TLS"},
		{x509.CertificateInvalidError{Reason: x509.Expired}, "expired"},
		{&os.PathError{Err: syscall.ENOSPC}, "disk is full"},
		{&os.PathError{Err: syscall.EACCES}, "may not"},
		{os.ErrDeadlineExceeded, "no answer in time"},
	} {
		if got := Advice(c.err); !strings.Contains(got, c.want) {
			t.Errorf("Advice(%v) = %q, want it to say %q", c.err, got, c.want)
		}
	}
	if got := Advice(errors.New("boom")); got != "" {
		t.Errorf("Advice of an unknown error = %q", got)
	}
}

func TestVersion(t *testing.T) {
	info := func(v string, settings ...debug.BuildSetting) *debug.BuildInfo {
		return &debug.BuildInfo{Main: debug.Module{Version: v}, Settings: settings}
	}
	rev := debug.BuildSetting{Key: "vcs.revision", Value: "0123456789abcdef0123"}
	for want, i := range map[string]*debug.BuildInfo{
		"(devel)":                          info(""),
		"v1.2.0":                           info("v1.2.0"),
		"v1.2.0 (0123456789ab)":            info("v1.2.0", rev),
		"(devel) (0123456789ab, modified)": info("(devel)", rev, debug.BuildSetting{Key: "vcs.modified", Value: "true"}),
	} {
		if got := version(i); got != want {
			t.Errorf("version = %q, want %q", got, want)
		}
	}
}
