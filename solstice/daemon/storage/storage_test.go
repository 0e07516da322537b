package storage

import (
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

func defaults() Database { return Database{DBPoolMaxSize: 16, DBPoolTimeoutMS: 5000} }

func TestEmbeddedDefaultsOpen(t *testing.T) {
	dir := t.TempDir()
	db, err := defaults().Open(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	q, err := Broker{}.Open(t.Context(), db, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = q.Close() }()
	if err := q.Publish(t.Context(), "topic", []queue.Message{{Body: []byte("x")}}, queue.PublishOptions{}); err != nil {
		t.Error(err)
	}
	blobs, err := Blobs{}.Open(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = blobs.Close() }()
	if _, err := blobs.Put(t.Context(), "a/b", strings.NewReader("x"), blobstore.PutOptions{}); err != nil {
		t.Error(err)
	}
	for _, f := range []string{"solstice.db", "blobs"} {
		if _, err := os.Stat(filepath.Join(dir, f)); err != nil {
			t.Error(err)
		}
	}
}

func TestDatabaseProblemsHaveAdvice(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := lis.Addr().String()
	_ = lis.Close()
	secret := filepath.Join(t.TempDir(), "url")
	if err := os.WriteFile(secret, []byte("mysql://u:hunter2@h/d\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	garbage := filepath.Join(t.TempDir(), "garbage.db")
	if err := os.WriteFile(garbage, []byte(strings.Repeat("this is no database ", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, url, file, advice string }{
		{"scheme, from a file", "", secret, "postgres://"},
		{"refused", "postgres://u:hunter2@" + closed + "/d", "", "start PostgreSQL"},
		{"not a database", "sqlite:" + garbage, "", "SQLite database"},
	} {
		d := defaults()
		d.DatabaseURL, d.DatabaseURLFile = c.url, c.file
		_, err := d.Open(t.Context(), "", nil)
		p, ok := errors.AsType[*daemon.Problem](err)
		if !ok || !strings.Contains(p.Advice, c.advice) {
			t.Errorf("%s: error %v, want advice about %q", c.name, err, c.advice)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error shows the password: %v", c.name, err)
		}
	}
}

func TestBucketOpens(t *testing.T) {
	b := testenv.S3(t)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(b.SecretKey+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	blobs, err := Blobs{
		S3Bucket: b.Bucket, S3Endpoint: b.Endpoint, S3Prefix: "ci/main", AWSRegion: b.Region,
		AWSAccessKeyID: b.AccessKey, AWSSecretAccessKeyFile: secret,
	}.Open(t.Context(), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = blobs.Close() }()
	if _, err := blobs.Put(t.Context(), "a/b", strings.NewReader("x"), blobstore.PutOptions{}); err != nil {
		t.Error(err)
	}
}

func TestBucketProblemsHaveAdvice(t *testing.T) {
	b := testenv.S3(t)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := "http://" + lis.Addr().String()
	_ = lis.Close()
	web := httptest.NewServer(http.NotFoundHandler())
	defer web.Close()
	secure := httptest.NewTLSServer(http.NotFoundHandler())
	defer secure.Close()
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	garbage := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(garbage, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		change func(*Blobs)
		advice string
	}{
		{"no bucket named", func(b *Blobs) { b.S3Bucket = "" }, "--s3-bucket"},
		{"two places", func(b *Blobs) { b.BlobFSRoot = "/somewhere" }, "--blob-fs-root or --s3-bucket"},
		{"half of the credentials", func(b *Blobs) { b.AWSSecretAccessKey = "" }, "or neither"},
		{"bad bucket name", func(b *Blobs) { b.S3Bucket = "Not_A_Bucket" }, "--s3-bucket (3 to 63"},
		{"endpoint with a path", func(b *Blobs) { b.S3Endpoint += "/bucket" }, "without the bucket"},
		{"endpoint with a password", func(b *Blobs) { b.S3Endpoint = "http://u:hunter2@127.0.0.1" }, "without the bucket"},
		{"host", func(b *Blobs) { b.S3Endpoint = "http://no-such-host.invalid" }, "does not resolve"},
		{"refused", func(b *Blobs) { b.S3Endpoint = closed }, "start the S3 service"},
		{"authority", func(b *Blobs) { b.S3Endpoint = secure.URL }, "--s3-ca"},
		{"authority's file", func(b *Blobs) { b.S3CA = garbage }, ""},
		{"https where http is", func(b *Blobs) { b.S3Endpoint = strings.Replace(b.S3Endpoint, "http:", "https:", 1) }, "http:// against https://"},
		{"key unknown", func(b *Blobs) { b.AWSAccessKeyID = "somebody" }, "--aws-access-key-id"},
		{"secret wrong", func(b *Blobs) { b.AWSSecretAccessKey = "hunter2" }, "--aws-secret-access-key"},
		{"region", func(b *Blobs) { b.AWSRegion = "eu-mars-1" }, "--aws-region"},
		{"bucket missing", func(b *Blobs) { b.S3Bucket = "no-such-bucket" }, "create the bucket"},
		{"a web server", func(b *Blobs) { b.S3Endpoint = web.URL }, "no S3 service"},
	} {
		f := Blobs{S3Bucket: b.Bucket, S3Endpoint: b.Endpoint, AWSRegion: b.Region, AWSAccessKeyID: b.AccessKey, AWSSecretAccessKey: b.SecretKey}
		c.change(&f)
		s, err := f.Open(t.Context(), t.TempDir(), nil)
		if err == nil {
			_ = s.Close()
		}
		p, ok := errors.AsType[*daemon.Problem](err)
		if !ok || !strings.Contains(p.Advice, c.advice) || p.Advice == "" && c.advice != "" {
			t.Errorf("%s: error %v, want advice about %q", c.name, err, c.advice)
		} else if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), b.SecretKey) {
			t.Errorf("%s: the error shows a secret: %v", c.name, err)
		} else {
			t.Logf("%s: %v; %s", c.name, err, p.Advice)
		}
	}
}

func TestNowhereToKeepState(t *testing.T) {
	if _, err := defaults().Open(t.Context(), "", nil); err == nil {
		t.Error("a database without URL and state directory was opened")
	}
	if _, err := (Blobs{}).Open(t.Context(), "", nil); err == nil {
		t.Error("a blob store without directory was opened")
	}
	if _, err := (Database{}).Open(t.Context(), t.TempDir(), nil); err == nil {
		t.Error("a pool of no connections was opened")
	}
}

func broker(url string) Broker {
	return Broker{AMQPURL: url, AMQPPrefetch: 64, AMQPExchange: "solstice.jobs", AMQPQueue: "solstice"}
}

func TestBrokerOpens(t *testing.T) {
	b := broker("")
	b.AMQPURLFile = filepath.Join(t.TempDir(), "url")
	if err := os.WriteFile(b.AMQPURLFile, []byte(testenv.RabbitMQ(t)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	q, err := b.Open(t.Context(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = q.Close() }()
	if err := q.Publish(t.Context(), "topic", []queue.Message{{Body: []byte("x")}}, queue.PublishOptions{}); err != nil {
		t.Error(err)
	}
}

// TestBrokerTLS: a problem with certificates is told from all others.
func TestBrokerTLS(t *testing.T) {
	ours, theirs := testenv.NewAuthority(t), testenv.NewAuthority(t)
	server := testenv.StartRabbitMQ(t, testenv.RabbitMQOptions{TLS: ours})
	cert := ours.Issue(t, "client")
	for _, c := range []struct {
		name         string
		change       func(*Broker)
		says, advice string
	}{
		{"both sides known", func(*Broker) {}, "", ""},
		{"authority not given", func(b *Broker) { b.AMQPCA = "" }, "unknown authority", "--amqp-ca"},
		{"authority of somebody else", func(b *Broker) { b.AMQPCA = theirs.File }, "unknown authority", "--amqp-ca"},
		{"no client certificate", func(b *Broker) { b.AMQPCert, b.AMQPKey = "", "" }, "none was given", "--amqp-cert"},
		{"host name", func(b *Broker) { b.AMQPURL += "?server_name_indication=elsewhere.example" }, "elsewhere.example", "amqps://"},
		{"amqp where amqps is", func(b *Broker) { b.AMQPURL = strings.Replace(b.AMQPURL, "amqps:", "amqp:", 1) }, "amqps", "amqp:// against amqps://"},
		{"amqps where amqp is", func(b *Broker) { b.AMQPURL = strings.Replace(server.URL(""), "amqp:", "amqps:", 1) }, "TLS", "amqp:// against amqps://"},
		{"password", func(b *Broker) { b.AMQPURL = strings.Replace(b.AMQPURL, ":guest@", ":hunter2@", 1) }, "password", "correct user and password"},
		{"virtual host", func(b *Broker) { b.AMQPURL = server.TLSURL("none") }, "virtual host", "create the virtual host"},
	} {
		b := broker(server.TLSURL(""))
		b.AMQPCA, b.AMQPCert, b.AMQPKey = ours.File, cert.Cert, cert.Key
		c.change(&b)
		q, err := b.Open(t.Context(), nil, nil)
		if err == nil {
			_ = q.Close()
		}
		if c.says == "" {
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		p, ok := errors.AsType[*daemon.Problem](err)
		if !ok || !strings.Contains(p.Advice, c.advice) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error %v, want %q and advice about %q", c.name, err, c.says, c.advice)
		}
	}
}

func TestBrokerProblemsHaveAdvice(t *testing.T) {
	url := testenv.RabbitMQ(t)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := lis.Addr().String()
	_ = lis.Close()
	missing := filepath.Join(t.TempDir(), "none.pem")
	for _, c := range []struct {
		name   string
		change func(*Broker)
		advice string
	}{
		{"not a URL", func(b *Broker) { b.AMQPURL = "rabbit:hunter2" }, "give --amqp-url as amqp://"},
		{"host", func(b *Broker) { b.AMQPURL = "amqp://u:hunter2@no-such-host.invalid/" }, "does not resolve"},
		{"refused", func(b *Broker) { b.AMQPURL = "amqp://u:hunter2@" + closed + "/" }, "start it, or correct them"},
		{"TLS", func(b *Broker) { b.AMQPURL = strings.Replace(url, "amqp://", "amqps://", 1) }, "amqp:// against amqps://"},
		{"password", func(b *Broker) { b.AMQPURL = strings.Replace(url, ":guest@", ":hunter2@", 1) }, "correct user and password"},
		{"virtual host", func(b *Broker) { b.AMQPURL = url + "-none" }, "create the virtual host"},
		{"prefix", func(b *Broker) { b.AMQPQueue = "Not Valid" }, "--amqp-exchange or --amqp-queue"},
		{"prefetch", func(b *Broker) { b.AMQPPrefetch = 0 }, "--amqp-prefetch"},
		{"half a certificate", func(b *Broker) { b.AMQPCert = missing }, "--amqp-cert and --amqp-key"},
		{"no authority", func(b *Broker) { b.AMQPCA = missing }, ""},
		{"certificates for nothing", func(b *Broker) { b.AMQPURL, b.AMQPCA = "", missing }, "give --amqp-url"},
	} {
		b := broker(url)
		c.change(&b)
		q, err := b.Open(t.Context(), nil, nil)
		if err == nil {
			_ = q.Close()
		}
		p, ok := errors.AsType[*daemon.Problem](err)
		if !ok || !strings.Contains(p.Advice, c.advice) || p.Advice == "" && c.advice != "" {
			t.Errorf("%s: error %v, want advice about %q", c.name, err, c.advice)
		} else if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "guest:guest") {
			t.Errorf("%s: the error shows a secret: %v", c.name, err)
		}
	}
}
