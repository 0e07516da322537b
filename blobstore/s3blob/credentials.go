package s3blob

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/minio/minio-go/v7/pkg/credentials"
)

// Credentials sign requests.
type Credentials struct {
	AccessKey, SecretKey, SessionToken string
	// Expires is when they have to be asked for anew; zero: never.
	Expires time.Time
}

// CredentialsFunc returns credentials. It is called again before they expire,
// not concurrently.
type CredentialsFunc func(ctx context.Context) (Credentials, error)

// credentialsTimeout bounds a request for credentials.
const credentialsTimeout = 5 * time.Second

// InstanceCredentials asks the metadata service of a virtual machine at AWS for
// the credentials of its role (IMDSv2). An empty url is its usual address.
//
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-security-credentials.html
func InstanceCredentials(url string) CredentialsFunc {
	if url == "" {
		url = "http://169.254.169.254"
	}
	url = strings.TrimSuffix(url, "/")
	return func(ctx context.Context) (Credentials, error) {
		const token = "X-aws-ec2-metadata-token" //nolint:gosec // a header's name
		session, err := ask(ctx, http.MethodPut, url+"/latest/api/token", token+"-ttl-seconds", "300")
		if err != nil {
			return Credentials{}, err
		}
		const roles = "/latest/meta-data/iam/security-credentials/"
		role, err := ask(ctx, http.MethodGet, url+roles, token, session)
		if err != nil {
			return Credentials{}, err
		}
		role, _, _ = strings.Cut(strings.TrimSpace(role), "\n")
		if role == "" {
			return Credentials{}, errors.New("the machine has no role")
		}
		answer, err := ask(ctx, http.MethodGet, url+roles+role, token, session)
		if err != nil {
			return Credentials{}, err
		}
		return parseCredentials(answer)
	}
}

// ContainerCredentials asks an endpoint inside a container for the credentials
// of its role, as in ECS and EKS; the token's file, if any, is read each time.
//
// https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html
func ContainerCredentials(url, tokenFile string) CredentialsFunc {
	return func(ctx context.Context) (Credentials, error) {
		token := ""
		if tokenFile != "" {
			data, err := os.ReadFile(tokenFile)
			if err != nil {
				return Credentials{}, err
			}
			token = strings.TrimSpace(string(data))
		}
		answer, err := ask(ctx, http.MethodGet, url, "Authorization", token)
		if err != nil {
			return Credentials{}, err
		}
		return parseCredentials(answer)
	}
}

func parseCredentials(answer string) (Credentials, error) {
	var a struct {
		Code, AccessKeyID, SecretAccessKey, Token string // encoding/json folds case
		Expiration                                time.Time
	}
	// What it failed at is not shown: it is a secret.
	if json.Unmarshal([]byte(answer), &a) != nil || a.Code != "" && a.Code != "Success" || a.AccessKeyID == "" || a.SecretAccessKey == "" {
		return Credentials{}, errors.New("the answer holds no credentials")
	}
	return Credentials{AccessKey: a.AccessKeyID, SecretKey: a.SecretAccessKey, SessionToken: a.Token, Expires: a.Expiration}, nil
}

// ask sends a request to a metadata service: near, without proxy or redirects.
func ask(ctx context.Context, method, url, header, value string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return "", err
	}
	if value != "" {
		req.Header.Set(header, value)
	}
	client := http.Client{
		Transport:     &http.Transport{DialContext: (&net.Dialer{Timeout: time.Second}).DialContext, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s answered %s", url, resp.Status)
	}
	return string(body), nil
}

// credentialsCache holds the credentials in use. Minio's own cache would make
// callers wait for each other whatever their contexts say; so each operation
// calls ensure, and minio finds them here.
type credentialsCache struct {
	get     CredentialsFunc
	log     *slog.Logger
	turn    chan struct{} // held by who asks for new ones
	current atomic.Pointer[Credentials]
	taken   atomic.Pointer[Credentials] // by minio
	tried   time.Time                   // under turn
}

var _ credentials.Provider = (*credentialsCache)(nil)

func newCredentialsCache(o Options) *credentialsCache {
	return &credentialsCache{get: o.Credentials, log: o.Logger, turn: make(chan struct{}, 1)}
}

const (
	renewAhead = 5 * time.Minute
	renewPause = 10 * time.Second // after a failure that could wait
)

func (c *credentialsCache) left() time.Duration {
	switch v := c.current.Load(); {
	case v == nil:
		return 0
	case v.Expires.IsZero():
		return 365 * 24 * time.Hour
	default:
		return time.Until(v.Expires)
	}
}

// ensure waits for credentials that have not expired.
func (c *credentialsCache) ensure(ctx context.Context) error {
	if c.left() > renewAhead {
		return nil
	}
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-c.turn }()
	if left := c.left(); left > renewAhead || left > 0 && time.Since(c.tried) < renewPause {
		return nil
	}
	c.tried = time.Now()
	ctx, cancel := context.WithTimeout(ctx, credentialsTimeout)
	defer cancel()
	v, err := c.get(ctx)
	if err == nil && (v.AccessKey == "" || v.SecretKey == "") {
		err = errors.New("they are empty")
	}
	switch {
	case err == nil:
		c.current.Store(&v)
		return nil
	case c.left() > 0:
		c.log.WarnContext(ctx, "s3blob: credentials could not be renewed yet", "error", err)
		return nil
	}
	return fmt.Errorf("s3blob: %w: %w", ErrNoCredentials, err)
}

// expire makes the next ensure ask for new ones. Calls that are past theirs go on
// with these, and hear that they have expired.
func (c *credentialsCache) expire() {
	if v := c.current.Load(); v != nil && !v.Expires.IsZero() {
		old := *v
		old.Expires = time.Now()
		c.current.CompareAndSwap(v, &old)
	}
}

// IsExpired implements credentials.Provider.
func (c *credentialsCache) IsExpired() bool { return c.taken.Load() != c.current.Load() }

// RetrieveWithCredContext implements credentials.Provider.
func (c *credentialsCache) RetrieveWithCredContext(*credentials.CredContext) (credentials.Value, error) {
	v := c.current.Load()
	if v == nil {
		return credentials.Value{}, ErrNoCredentials
	}
	c.taken.Store(v)
	return credentials.Value{
		AccessKeyID: v.AccessKey, SecretAccessKey: v.SecretKey, SessionToken: v.SessionToken,
		Expiration: v.Expires, SignerType: credentials.SignatureV4,
	}, nil
}

// Retrieve implements credentials.Provider.
func (c *credentialsCache) Retrieve() (credentials.Value, error) {
	return c.RetrieveWithCredContext(nil)
}
