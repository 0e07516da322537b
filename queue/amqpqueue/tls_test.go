package amqpqueue_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/amqpqueue"
)

// identity is a client's TLS: who it trusts and, unless cert is nil, who it is.
func identity(t *testing.T, ca *testenv.Authority, cert *testenv.Certificate) *tls.Config {
	t.Helper()
	pem, err := os.ReadFile(ca.File)
	if err != nil {
		t.Fatal(err)
	}
	c := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	if !c.RootCAs.AppendCertsFromPEM(pem) {
		t.Fatal("no certificate")
	}
	if cert != nil {
		pair, err := tls.LoadX509KeyPair(cert.Cert, cert.Key)
		if err != nil {
			t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c
}

func TestTLS(t *testing.T) {
	ours, theirs := testenv.NewAuthority(t), testenv.NewAuthority(t)
	broker := testenv.StartRabbitMQ(t, testenv.RabbitMQOptions{TLS: ours})
	url := broker.TLSURL("")
	cert := ours.Issue(t, "client")
	t.Run("both sides known", func(t *testing.T) {
		q := withURL(t, amqpqueue.Options{URL: url, TLS: identity(t, ours, cert)})
		sub := subscribe(t, q, "t", queue.SubscribeOptions{Group: "g"})
		publish(t, q, "t", "m")
		if err := expect(t, sub, "m").Ack(t.Context()); err != nil {
			t.Error(err)
		}
	})
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, c := range []struct {
			name, url string
			tls       *tls.Config
			is        func(error) bool
			says      string
		}{
			{"authority unknown", url, identity(t, theirs, cert), as[x509.UnknownAuthorityError], "unknown authority"},
			{"host name wrong", url + "?server_name_indication=elsewhere.example", identity(t, ours, cert), as[x509.HostnameError], "elsewhere.example"},
			{"no client certificate", url, identity(t, ours, nil), nil, "none was given"},
			{"client certificate of somebody else", url, identity(t, ours, theirs.Issue(t, "stranger")), nil, "certificate"},
			{"TLS where there is none", strings.Replace(broker.URL(""), "amqp:", "amqps:", 1), identity(t, ours, cert), nil, "TLS"},
		} {
			t.Run(tls.VersionName(version)+"/"+c.name, func(t *testing.T) {
				c.tls.MaxVersion = version
				q, err := amqpqueue.Open(t.Context(), amqpqueue.Options{URL: c.url, TLS: c.tls})
				if err == nil {
					_ = q.Close()
				}
				if !errors.Is(err, amqpqueue.ErrTLS) || c.is != nil && !c.is(err) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("error %v, want ErrTLS that says %q", err, c.says)
				}
				t.Log(err)
			})
		}
	}
	t.Run("no TLS where there is", func(t *testing.T) {
		q, err := amqpqueue.Open(t.Context(), amqpqueue.Options{URL: strings.Replace(url, "amqps:", "amqp:", 1)})
		if err == nil {
			_ = q.Close()
		}
		if !errors.Is(err, amqpqueue.ErrTLS) || !strings.Contains(err.Error(), "amqps") {
			t.Errorf("error %v, want ErrTLS that says amqps", err)
		}
		t.Log(err)
	})
}

func as[T error](err error) bool {
	_, ok := errors.AsType[T](err)
	return ok
}
