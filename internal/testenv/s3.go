package testenv

import (
	"context"
	"crypto/rand"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// versitygw is where .mise/tasks/setup/tools builds the S3 server.
const versitygw = "solstice/tools/versitygw-v1.8.0/versitygw"

var errNoS3 = errors.New("the S3 server versitygw was not found (.mise/tasks/setup/tools versitygw builds it)")

// S3Server is an S3 server with a directory of its own.
type S3Server struct {
	Program, Dir         string
	Port                 int
	AccessKey, SecretKey string
}

// S3Bucket says how to reach a bucket.
type S3Bucket struct {
	Endpoint             string // http://127.0.0.1:PORT
	Region               string
	Bucket               string
	AccessKey, SecretKey string
}

var sharedS3 = sync.OnceValues(func() (*S3Server, error) {
	program, err := findS3()
	if err != nil {
		return nil, err
	}
	return share("s3", func(dir string) (*S3Server, error) { return launchS3(program, dir) })
})

// S3 returns a fresh bucket on the server that the tests of this run share.
func S3(t testing.TB) S3Bucket {
	t.Helper()
	s, err := sharedS3()
	if err != nil {
		missingS3(t, err)
	}
	return s.Bucket(t)
}

// StartS3 starts a server that only this test uses, and so may kill, pause and
// restart.
func StartS3(t testing.TB) *S3Server {
	t.Helper()
	program, err := findS3()
	if err != nil {
		missingS3(t, err)
	}
	var s *S3Server
	private(t, "s3", func(dir string) error {
		s, err = launchS3(program, dir)
		return err
	})
	return s
}

func missingS3(t testing.TB, err error) {
	t.Helper()
	if errors.Is(err, errNoS3) {
		Missing(t, "an S3 server", err.Error())
	}
	t.Fatalf("start the S3 server: %v", err)
}

func findS3() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	program := filepath.Join(cache, filepath.FromSlash(versitygw))
	if _, err := os.Stat(program); err != nil {
		return "", errNoS3
	}
	return program, nil
}

func launchS3(program, dir string) (*S3Server, error) {
	ports, err := freePorts(1)
	if err != nil {
		return nil, err
	}
	s := &S3Server{Program: program, Dir: dir, Port: ports[0], AccessKey: "test", SecretKey: rand.Text()}
	if err := os.Mkdir(filepath.Join(dir, "data"), 0o700); err != nil {
		return nil, err
	}
	return s, s.start()
}

func (s *S3Server) start() error {
	env := []string{"HOME=" + s.Dir, "ROOT_ACCESS_KEY=" + s.AccessKey, "ROOT_SECRET_KEY=" + s.SecretKey}
	err := spawn(s.Dir, "s3", env, s.Program, "-q", "--port", loopback(s.Port), "--region", "us-east-1", "posix", filepath.Join(s.Dir, "data"))
	if err != nil {
		return err
	}
	return await(s.Dir, "s3.pid", func(ctx context.Context) error {
		c, err := s.client()
		if err == nil {
			_, err = c.ListBuckets(ctx)
		}
		return err
	}, "s3.log")
}

func (s *S3Server) client() (*minio.Client, error) {
	return minio.New(loopback(s.Port), &minio.Options{
		Creds: credentials.NewStaticV4(s.AccessKey, s.SecretKey, ""), Region: "us-east-1", MaxRetries: 1,
		Transport: &http.Transport{DisableKeepAlives: true}, // which a check for leaked goroutines would find
	})
}

// URL of the server.
func (s *S3Server) URL() string { return "http://" + loopback(s.Port) }

// Bucket makes an empty bucket. It stays until the server stops.
func (s *S3Server) Bucket(t testing.TB) S3Bucket {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	b, err := s.bucket(ctx, "t"+strings.ToLower(rand.Text()))
	if err != nil {
		t.Fatalf("make a bucket: %v", err)
	}
	return b
}

func (s *S3Server) bucket(ctx context.Context, name string) (S3Bucket, error) {
	b := S3Bucket{Endpoint: s.URL(), Region: "us-east-1", Bucket: name, AccessKey: s.AccessKey, SecretKey: s.SecretKey}
	c, err := s.client()
	if err == nil {
		err = c.MakeBucket(ctx, b.Bucket, minio.MakeBucketOptions{Region: b.Region})
	}
	return b, err
}

func (s *S3Server) pidFile() string { return filepath.Join(s.Dir, "s3.pid") }

// Kill ends the server with SIGKILL, as a crash would.
func (s *S3Server) Kill(t testing.TB) { kill(t, s.pidFile()) }

// Start starts the server again after Kill.
func (s *S3Server) Start(t testing.TB) {
	t.Helper()
	if err := s.start(); err != nil {
		t.Fatalf("start the S3 server: %v", err)
	}
}

// Restart stops the server in an orderly way and starts it.
func (s *S3Server) Restart(t testing.TB) {
	t.Helper()
	pid, err := readPID(s.pidFile())
	if err != nil {
		t.Fatal(err)
	}
	signal(t, syscall.SIGTERM, s.pidFile())
	waitGone(t, pid)
	s.Start(t)
}

// Pause stops the server with SIGSTOP: connections stay open and nothing
// answers. Resume lets it go on.
func (s *S3Server) Pause(t testing.TB) { signal(t, syscall.SIGSTOP, s.pidFile()) }

// Resume ends a Pause.
func (s *S3Server) Resume(t testing.TB) { signal(t, syscall.SIGCONT, s.pidFile()) }
