package testenv_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// declare connects, declares a durable queue and publishes to it, within d.
func declare(url string, c amqp.Config, d time.Duration) error {
	c.Dial = amqp.DefaultDial(d)
	done := make(chan error, 1)
	go func() {
		done <- func() error {
			conn, err := amqp.DialConfig(url, c)
			if err != nil {
				return err
			}
			defer func() { _ = conn.CloseDeadline(time.Now().Add(d)) }()
			ch, err := conn.Channel()
			if err != nil {
				return err
			}
			if _, err = ch.QueueDeclare("q", true, false, false, false, nil); err != nil {
				return err
			}
			if err := ch.Confirm(false); err != nil {
				return err
			}
			confirm, err := ch.PublishWithDeferredConfirm("", "q", false, false, amqp.Publishing{DeliveryMode: amqp.Persistent, Body: []byte("x")})
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), d)
			defer cancel()
			_, err = confirm.WaitContext(ctx)
			return err
		}()
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(2 * d):
		return context.DeadlineExceeded
	}
}

const patience = time.Minute

func TestRabbitMQIsSharedAndFresh(t *testing.T) {
	a, b := testenv.RabbitMQ(t), testenv.RabbitMQ(t)
	if a == b {
		t.Fatalf("%s was handed out twice", a)
	}
	ua, err := url.Parse(a)
	if err != nil {
		t.Fatal(err)
	}
	if ub, err := url.Parse(b); err != nil || ub.Host != ua.Host {
		t.Errorf("%s and %s are different brokers (%v)", ua.Host, ub.Host, err)
	}
	for _, u := range []string{a, b} {
		if err := declare(u, amqp.Config{}, patience); err != nil {
			t.Error(err)
		}
	}
}

func TestRabbitMQVerbs(t *testing.T) {
	ca := testenv.NewAuthority(t)
	s := testenv.StartRabbitMQ(t, testenv.RabbitMQOptions{TLS: ca})
	vhost := s.VHost(t)
	await := func(want int) { // what the broker says lags behind
		t.Helper()
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for deadline := time.Now().Add(patience); ; <-tick.C {
			n := -1 // no queue
			for _, q := range s.Queues(t, vhost) {
				if q.Name == "q" {
					n = q.Messages
				}
			}
			if n == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("the queue has %d messages, want %d", n, want)
			}
		}
	}
	must := func(what string) {
		t.Helper()
		if err := declare(vhost, amqp.Config{}, patience); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	must("at first")
	s.Kill(t)
	if err := declare(vhost, amqp.Config{}, patience); err == nil {
		t.Fatal("a killed broker answers")
	}
	s.Start(t)
	must("after a crash")
	s.PurgeQueue(t, vhost, "q") // a crash may cost what a queue had that was seconds old
	await(0)
	must("before a restart")
	s.Restart(t)
	must("after a restart")
	await(2)
	s.Pause(t)
	if err := declare(vhost, amqp.Config{}, 100*time.Millisecond); err == nil {
		t.Fatal("a paused broker answers")
	}
	s.Resume(t)
	must("resumed")
	s.MemoryAlarm(t, true)
	if err := declare(vhost, amqp.Config{}, time.Second); err == nil {
		t.Fatal("a broker without memory takes a message")
	}
	s.MemoryAlarm(t, false)
	must("with memory")
	s.PurgeQueue(t, vhost, "q")
	await(0)
	s.DeleteQueue(t, vhost, "q")
	await(-1)

	pool := x509.NewCertPool()
	if pem, err := os.ReadFile(ca.File); err != nil || !pool.AppendCertsFromPEM(pem) {
		t.Fatal(err)
	}
	files := ca.Issue(t, "client")
	cert, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		t.Fatal(err)
	}
	if err := declare(s.TLSURL(""), amqp.Config{TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}}}, patience); err != nil {
		t.Errorf("over TLS: %v", err)
	}
	if err := declare(s.TLSURL(""), amqp.Config{TLSClientConfig: &tls.Config{RootCAs: pool}}, patience); err == nil {
		t.Error("the broker takes a client without a certificate")
	}
}

func client(t *testing.T, b testenv.S3Bucket) *minio.Client {
	t.Helper()
	u, err := url.Parse(b.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	c, err := minio.New(u.Host, &minio.Options{Creds: credentials.NewStaticV4(b.AccessKey, b.SecretKey, ""), Region: b.Region, MaxRetries: 1})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func put(ctx context.Context, c *minio.Client, bucket string) error {
	_, err := c.PutObject(ctx, bucket, "k", strings.NewReader("x"), 1, minio.PutObjectOptions{})
	return err
}

func TestS3IsSharedAndFresh(t *testing.T) {
	a, b := testenv.S3(t), testenv.S3(t)
	if a.Endpoint != b.Endpoint || a.Bucket == b.Bucket {
		t.Errorf("buckets %s and %s, at %s and %s", a.Bucket, b.Bucket, a.Endpoint, b.Endpoint)
	}
	if err := put(t.Context(), client(t, a), a.Bucket); err != nil {
		t.Fatal(err)
	}
	if _, err := client(t, b).StatObject(t.Context(), b.Bucket, "k", minio.StatObjectOptions{}); minio.ToErrorResponse(err).Code != "NoSuchKey" {
		t.Errorf("the other bucket: %v", err)
	}
}

func TestS3Verbs(t *testing.T) {
	s := testenv.StartS3(t)
	b := s.Bucket(t)
	c := client(t, b)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := put(ctx, c, b.Bucket); err != nil {
		t.Fatal(err)
	}
	s.Kill(t)
	if err := put(ctx, c, b.Bucket); err == nil {
		t.Fatal("a killed server answers")
	}
	s.Start(t)
	if _, err := c.StatObject(ctx, b.Bucket, "k", minio.StatObjectOptions{}); err != nil {
		t.Errorf("after a crash: %v", err)
	}
	s.Restart(t)
	s.Pause(t)
	short, end := context.WithTimeout(ctx, 100*time.Millisecond)
	defer end()
	if err := put(short, c, b.Bucket); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a paused server: %v", err)
	}
	s.Resume(t)
	if err := put(ctx, c, b.Bucket); err != nil {
		t.Error(err)
	}
}

func TestProxy(t *testing.T) {
	b := testenv.S3(t)
	u, err := url.Parse(b.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	p := testenv.NewProxy(t, u.Host)
	b.Endpoint = "http://" + p.Addr()
	c := client(t, b)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := put(ctx, c, b.Bucket); err != nil {
		t.Fatal(err)
	}
	p.Cut()
	if err := put(ctx, c, b.Bucket); err == nil {
		t.Error("a cut connection works")
	}
	p.Restore(t)
	if err := put(ctx, c, b.Bucket); err != nil {
		t.Error(err)
	}
	remove := p.Add(t, "latency", testenv.ToClient, map[string]any{"latency": patience.Milliseconds()})
	short, end := context.WithTimeout(ctx, 100*time.Millisecond)
	defer end()
	if err := put(short, c, b.Bucket); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with nothing coming back: %v", err)
	}
	remove()
	if err := put(ctx, c, b.Bucket); err != nil {
		t.Error(err)
	}
}
