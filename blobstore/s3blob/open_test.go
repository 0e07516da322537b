package s3blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

func FuzzNames(f *testing.F) {
	for _, key := range []string{"a", "a/b", "a b", "!", `"`, `"0`, `a"2!/ b`, "é/日本"} {
		f.Add(key, key+"!")
	}
	s := &Store{o: Options{Prefix: "p/q/"}}
	f.Fuzz(func(t *testing.T, a, b string) {
		if key, ok := s.key(a); ok && s.name(key) != a {
			t.Fatalf("%q is taken for the name of %q, which is %q", a, key, s.name(key))
		}
		if blobstore.ValidateKey(a) != nil || blobstore.ValidateKey(b) != nil {
			return
		}
		na, nb := s.name(a), s.name(b)
		if key, ok := s.key(na); !ok || key != a {
			t.Fatalf("%q became %q became %q", a, na, key)
		}
		if strings.Compare(a, b) != strings.Compare(na, nb) {
			t.Fatalf("%q and %q sort otherwise than %q and %q", a, b, na, nb)
		}
		if strings.HasPrefix(nb, na+"/") {
			t.Fatalf("%q is a directory of %q", na, nb)
		}
	})
}

// TestHostileEnvironment: neither credentials nor proxies nor anything else
// comes from the environment or a file that it names.
func TestHostileEnvironment(t *testing.T) {
	b := testenv.S3(t)
	evil := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the environment's server was asked") }))
	defer evil.Close()
	dir := t.TempDir()
	file := filepath.Join(dir, "credentials")
	if err := os.WriteFile(file, []byte("[default]\naws_access_key_id = evil\naws_secret_access_key = evil\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, ".aws"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(file, filepath.Join(dir, ".aws", "credentials")); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": "evil", "AWS_ACCESS_KEY": "evil", "AWS_SECRET_ACCESS_KEY": "evil", "AWS_SECRET_KEY": "evil", "AWS_SESSION_TOKEN": "evil",
		"AWS_REGION": "evil", "AWS_DEFAULT_REGION": "evil", "AWS_PROFILE": "evil", "AWS_ENDPOINT_URL": evil.URL, "AWS_ENDPOINT_URL_S3": evil.URL,
		"AWS_CONFIG_FILE": file, "AWS_SHARED_CREDENTIALS_FILE": file, "AWS_ROLE_ARN": "evil", "AWS_ROLE_SESSION_NAME": "evil", "AWS_WEB_IDENTITY_TOKEN_FILE": file,
		"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/evil", "AWS_CONTAINER_CREDENTIALS_FULL_URI": evil.URL,
		"AWS_CONTAINER_AUTHORIZATION_TOKEN": "evil", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": file, "AWS_EC2_METADATA_SERVICE_ENDPOINT": evil.URL,
		"MINIO_ACCESS_KEY": "evil", "MINIO_SECRET_KEY": "evil", "MINIO_ROOT_USER": "evil", "MINIO_ROOT_PASSWORD": "evil",
		"MINIO_ALIAS": "evil", "MINIO_SHARED_CREDENTIALS_FILE": file,
		"HTTP_PROXY": evil.URL, "HTTPS_PROXY": evil.URL, "ALL_PROXY": evil.URL, "http_proxy": evil.URL, "https_proxy": evil.URL, "all_proxy": evil.URL, "NO_PROXY": "", "no_proxy": "",
		"HOME": dir, "SSL_CERT_FILE": file,
	} {
		t.Setenv(name, value)
	}
	o := optionsFor(b)
	s := open(t, o)
	if s.transport.Proxy != nil { // which the loopback would not go through
		t.Error("there is a proxy")
	}
	if _, err := s.Put(t.Context(), "k", strings.NewReader("x"), blobstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	url, err := s.PresignGet(t.Context(), "k", time.Minute)
	if err != nil || strings.Contains(url, "evil") {
		t.Errorf("presigned %s, %v", url, err)
	}
	o.AccessKey, o.SecretKey = "", ""
	none := httptest.NewServer(http.NotFoundHandler())
	defer none.Close()
	o.Credentials = InstanceCredentials(none.URL)
	if _, err := Open(t.Context(), o); !errors.Is(err, ErrNoCredentials) {
		t.Errorf("without credentials: %v", err)
	}
}

// metadata is the metadata service of a machine with a role.
type metadata struct {
	bucket  testenv.S3Bucket
	expires atomic.Pointer[time.Time]
	asked   atomic.Int32
	broken  atomic.Bool
}

func (m *metadata) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	const roles = "/latest/meta-data/iam/security-credentials/"
	switch {
	case m.broken.Load():
		http.Error(w, "no", http.StatusInternalServerError)
	case r.Method == http.MethodPut && r.URL.Path == "/latest/api/token" && r.Header.Get("X-aws-ec2-metadata-token-ttl-seconds") != "":
		_, _ = io.WriteString(w, "session")
	case r.Header.Get("X-aws-ec2-metadata-token") != "session" && r.Header.Get("Authorization") != "container":
		http.Error(w, "no session", http.StatusUnauthorized)
	case r.URL.Path == roles:
		_, _ = io.WriteString(w, "solstice\n")
	case r.URL.Path == roles+"solstice" || r.URL.Path == "/container":
		m.asked.Add(1)
		fmt.Fprintf(w, `{"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": %q, "SecretAccessKey": %q, "Token": "", "Expiration": %q}`,
			m.bucket.AccessKey, m.bucket.SecretKey, m.expires.Load().UTC().Format(time.RFC3339))
	default:
		http.NotFound(w, r)
	}
}

func newMetadata(t *testing.T) (m *metadata, url string) {
	m = &metadata{bucket: testenv.S3(t)}
	m.expireIn(time.Hour)
	server := httptest.NewServer(m)
	t.Cleanup(server.Close)
	return m, server.URL
}

func (m *metadata) expireIn(d time.Duration) {
	at := time.Now().Add(d)
	m.expires.Store(&at)
}

func TestInstanceCredentials(t *testing.T) {
	m, url := newMetadata(t)
	o := optionsFor(m.bucket)
	o.AccessKey, o.SecretKey, o.Credentials = "", "", InstanceCredentials(url)
	m.expireIn(time.Minute) // soon
	s := open(t, o)
	put := func() error {
		_, err := s.Put(t.Context(), "k", strings.NewReader("x"), blobstore.PutOptions{})
		return err
	}
	// Soon enough to be renewed, but not at every call.
	if err := put(); err != nil || m.asked.Load() != 1 {
		t.Fatalf("asked %d times, %v", m.asked.Load(), err)
	}
	<-s.creds.turnTried(t)
	m.broken.Store(true)
	if err := put(); err != nil { // they are good for a while
		t.Fatal(err)
	}
	m.broken.Store(false)
	<-s.creds.turnTried(t)
	m.expireIn(time.Hour)
	for range 3 {
		if err := put(); err != nil {
			t.Fatal(err)
		}
	}
	if n := m.asked.Load(); n != 2 {
		t.Fatalf("asked %d times", n)
	}
	s.creds.expire()
	m.broken.Store(true)
	if err := put(); !errors.Is(err, ErrNoCredentials) {
		t.Fatalf("expired, and no new ones: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	s.creds.turn <- struct{}{} // somebody waits for an answer
	cancelled := make(chan error, 1)
	go func() { _, err := s.Stat(ctx, "k"); cancelled <- err }()
	cancel()
	if err := <-cancelled; !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	<-s.creds.turn
}

// turnTried makes the cache forget when it last tried.
func (c *credentialsCache) turnTried(t *testing.T) <-chan struct{} {
	t.Helper()
	c.turn <- struct{}{}
	c.tried = time.Time{}
	return c.turn
}

func TestContainerCredentials(t *testing.T) {
	m, url := newMetadata(t)
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("container\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	o := optionsFor(m.bucket)
	o.AccessKey, o.SecretKey, o.Credentials = "", "", ContainerCredentials(url+"/container", token)
	open(t, o)
	o.Credentials = ContainerCredentials(url+"/container", filepath.Join(t.TempDir(), "none"))
	if _, err := Open(t.Context(), o); !errors.Is(err, ErrNoCredentials) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without the token's file: %v", err)
	}
	o.Credentials = ContainerCredentials(url+"/elsewhere", token)
	if _, err := Open(t.Context(), o); !errors.Is(err, ErrNoCredentials) {
		t.Errorf("at a wrong URL: %v", err)
	}
}

// TestExpiredTokenIsRenewed: the service's word counts, too.
func TestExpiredTokenIsRenewed(t *testing.T) {
	g, o := newGateway(t)
	var asked atomic.Int32
	good := Credentials{AccessKey: o.AccessKey, SecretKey: o.SecretKey, Expires: time.Now().Add(time.Hour)}
	o.AccessKey, o.SecretKey = "", ""
	o.Credentials = func(context.Context) (Credentials, error) { asked.Add(1); return good, nil }
	s := open(t, o)
	g.inject("PutObject", func(w http.ResponseWriter, _ *http.Request, n int) bool {
		if n == 1 {
			refuse(w, 400, "ExpiredToken")
		}
		return n == 1
	})
	if _, err := s.Put(t.Context(), "k", content(small), blobstore.PutOptions{}); err != nil || asked.Load() != 2 {
		t.Fatalf("asked %d times, %v", asked.Load(), err)
	}
}

// TestExpiredTokenUnderParts: those parts of an upload that are begun after one
// heard of it, and before there are new credentials, go on.
func TestExpiredTokenUnderParts(t *testing.T) {
	g, o := newGateway(t)
	good := Credentials{AccessKey: o.AccessKey, SecretKey: o.SecretKey, Expires: time.Now().Add(time.Hour)}
	o.AccessKey, o.SecretKey, o.Parallel = "", "", 1
	o.Credentials = func(context.Context) (Credentials, error) { return good, nil }
	s := open(t, o)
	g.inject("UploadPart", func(http.ResponseWriter, *http.Request, int) bool {
		s.creds.expire() // as another call does
		return false
	})
	if _, err := s.Put(t.Context(), "k", content(large), blobstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	g.heal()
	has(t, s, "k", large)
}

// TestRenewedCredentialsSignEverything: requests and presigned URLs, whichever
// is first to need them.
func TestRenewedCredentialsSignEverything(t *testing.T) {
	o := optionsFor(testenv.S3(t))
	now := Credentials{AccessKey: o.AccessKey, SecretKey: o.SecretKey, Expires: time.Now().Add(time.Hour)}
	o.AccessKey, o.SecretKey = "", ""
	o.Credentials = func(context.Context) (Credentials, error) { return now, nil }
	s := open(t, o)
	presigned := func() string {
		t.Helper()
		u, err := s.PresignGet(t.Context(), "k", time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	presigned()
	for _, token := range []string{"first", "second"} {
		now.SessionToken = token
		s.creds.expire()
		_ = s.Check(t.Context()) // the request is signed, whatever the service says of a token
		if u := presigned(); !strings.Contains(u, "X-Amz-Security-Token="+token) {
			t.Errorf("after a request with the token %s: %s", token, u)
		}
	}
}

// TestCheck: a bucket that went is noticed, though Stat finds nothing strange.
func TestCheck(t *testing.T) {
	s := open(t, optionsFor(testenv.S3(t)))
	if err := s.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.s3.RemoveBucket(t.Context(), s.o.Bucket); err != nil {
		t.Fatal(err)
	}
	if err := s.Check(t.Context()); !errors.Is(err, ErrNoBucket) {
		t.Fatalf("error %v", err)
	}
	if _, err := s.Put(t.Context(), "k", strings.NewReader("x"), blobstore.PutOptions{}); !errors.Is(err, ErrNoBucket) {
		t.Fatalf("error %v", err)
	}
}

func TestOptions(t *testing.T) {
	for name, o := range map[string]Options{
		"no bucket":        {},
		"half credentials": {Bucket: "bucket", AccessKey: "a"},
		"bad prefix":       {Bucket: "bucket", Prefix: "a//b"},
		"long prefix":      {Bucket: "bucket", Prefix: strings.Repeat("a/", 200)},
		"small parts":      {Bucket: "bucket", PartSize: 1},
		"negative":         {Bucket: "bucket", Attempts: -1},
	} {
		if _, err := Open(t.Context(), o); !errors.Is(err, blobstore.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAddressing: where requests and presigned URLs go.
func TestAddressing(t *testing.T) {
	for want, o := range map[string]Options{
		"https://bucket.s3.dualstack.eu-central-1.amazonaws.com/p/k%21?": {Region: "eu-central-1", Prefix: "/p/"},
		"http://127.0.0.1:9000/bucket/k%21?":                             {Endpoint: "http://127.0.0.1:9000"},
		"https://s3.example.com/bucket/k%21?":                            {Endpoint: "s3.example.com"},
		"https://bucket.s3.example.com/k%21?":                            {Endpoint: "https://s3.example.com/", VirtualHost: true},
		"https://outside.example.com/bucket/k%21?":                       {Endpoint: "http://10.0.0.1:9000", PresignEndpoint: "https://outside.example.com"},
	} {
		o.Bucket, o.AccessKey, o.SecretKey = "bucket", "key", "secret"
		if err := o.fill(); err != nil {
			t.Fatal(err)
		}
		s := newStore(o)
		if err := s.creds.ensure(t.Context()); err != nil {
			t.Fatal(err)
		}
		client, err := s.client(o.PresignEndpoint)
		if err != nil {
			t.Fatal(err)
		}
		u, err := client.Presign(t.Context(), http.MethodGet, o.Bucket, s.name("k"), time.Hour, nil)
		if err != nil || !strings.HasPrefix(u.String(), want) {
			t.Errorf("%v, %v, want %s…", u, err, want)
		}
	}
}

// TestTelemetry: what the package's comment names, and no secret.
func TestTelemetry(t *testing.T) {
	g, o := newGateway(t)
	spans := tracetest.NewSpanRecorder()
	reader := sdkmetric.NewManualReader()
	var logged strings.Builder
	o.TracerProvider = trace.NewTracerProvider(trace.WithSpanProcessor(spans))
	o.MeterProvider = sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
	o.Logger = slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s := open(t, o)
	g.inject("PutObject", func(w http.ResponseWriter, _ *http.Request, n int) bool {
		if n == 1 {
			refuse(w, 503, "SlowDown")
		}
		return n == 1
	})
	if _, err := s.Put(t.Context(), "k", content(small), blobstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	has(t, s, "k", small)
	if _, err := s.Stat(t.Context(), "none"); !errors.Is(err, blobstore.ErrNotFound) {
		t.Fatal(err)
	}
	var names []string
	for _, span := range spans.Ended() {
		names = append(names, span.Name())
	}
	if got := strings.Join(names, " "); got != "s3blob.Check s3blob.Put s3blob.Get s3blob.Stat" {
		t.Errorf("spans %s", got)
	}
	var rm metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &rm); err != nil {
		t.Fatal(err)
	}
	counted := map[string]int64{}
	for _, m := range rm.ScopeMetrics[0].Metrics {
		switch data := m.Data.(type) {
		case metricdata.Sum[int64]:
			for _, p := range data.DataPoints {
				op, _ := p.Attributes.Value("op")
				counted[m.Name+" "+op.AsString()] += p.Value
			}
		case metricdata.Histogram[float64]:
			for _, p := range data.DataPoints {
				op, _ := p.Attributes.Value("op")
				outcome, _ := p.Attributes.Value("outcome")
				counted[m.Name+" "+op.AsString()+" "+outcome.AsString()] += int64(p.Count)
			}
		}
	}
	for what, n := range map[string]int64{
		"solstice.blob.bytes put": small, "solstice.blob.bytes get": small, "solstice.blob.retries put": 1,
		"solstice.blob.duration put ok": 1, "solstice.blob.duration get ok": 1, "solstice.blob.duration stat not_found": 1, "solstice.blob.duration check ok": 1,
	} {
		if counted[what] != n {
			t.Errorf("%s is %d, want %d", what, counted[what], n)
		}
	}
	if strings.Contains(logged.String(), o.SecretKey) || !strings.Contains(logged.String(), "again") {
		t.Errorf("logged: %s", logged.String())
	}
}
