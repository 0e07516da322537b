package orchestrator

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/uptrace/bun"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice"
)

// TokenTTL is how long what is known of a token is believed: a revoked one is
// refused after that at the latest by every orchestrator, and at once by the
// one that revoked it.
const TokenTTL = 5 * time.Second

// maxCached bounds the tokens that are known without asking.
const maxCached = 1000

// maxTokenBytes bounds what is looked at as a token.
const maxTokenBytes = 256

// ErrExists: there is a token of that name.
var ErrExists = errors.New("orchestrator: name is taken")

// Token is a bearer token, without the secret itself.
type Token struct {
	ID, Name             string
	Role                 Role
	CreatedAt, ExpiresAt time.Time // ExpiresAt zero: never
	UsedAt               time.Time // to the minute; zero: never
}

// Tokens are the bearer tokens of an installation. They are kept in its
// database, as hashes. Methods are safe for concurrent use.
type Tokens struct {
	store *store.Store

	mu     sync.Mutex
	cached map[string]cachedRole // by hash
}

type cachedRole struct {
	role  Role
	until time.Time
}

// OpenTokens gives the tokens in a database that is migrated.
func OpenTokens(ctx context.Context, db *bun.DB) (*Tokens, error) {
	s, err := store.New(ctx, db, store.Options{})
	if err != nil {
		return nil, fmt.Errorf("orchestrator: open tokens: %w", err)
	}
	return &Tokens{store: s, cached: map[string]cachedRole{}}, nil
}

// A name is never mistaken for an ID, which has 36 characters.
var tokenName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._@-]{0,31}$`)

// Create makes a token that lives for ttl, or for ever (0), and gives its
// secret, which is not kept. Errors wrap ErrExists or solstice.ErrInvalid.
func (t *Tokens) Create(ctx context.Context, name string, role Role, ttl time.Duration) (Token, string, error) {
	switch {
	case !tokenName.MatchString(name):
		return Token{}, "", fmt.Errorf("%w: a token's name has 1 to 32 letters, digits and ._@-", solstice.ErrInvalid)
	case role < Read || role > Admin:
		return Token{}, "", fmt.Errorf("%w: a token's role is read, write or admin", solstice.ErrInvalid)
	case ttl < 0:
		return Token{}, "", fmt.Errorf("%w: a token cannot live for %s", solstice.ErrInvalid, ttl)
	}
	secret := newSecret()
	token, err := t.create(ctx, name, role, ttl, secret)
	if err != nil {
		return Token{}, "", err
	}
	return token, secret, nil
}

// A secret has 128 random bits.
func newSecret() string { return "sol_" + rand.Text() }

var secretForm = regexp.MustCompile(`^sol_[A-Z2-7]{26}$`)

func (t *Tokens) create(ctx context.Context, name string, role Role, ttl time.Duration, secret string) (Token, error) {
	row, err := t.store.InsertToken(ctx, name, hash(secret), role.String(), ttl)
	if errors.Is(err, store.ErrDuplicate) {
		err = fmt.Errorf("%w: there is a token %s", ErrExists, name)
	}
	if err != nil {
		return Token{}, err
	}
	return publicToken(row), nil
}

// List gives the tokens that were not revoked, by name.
func (t *Tokens) List(ctx context.Context) ([]Token, error) {
	rows, err := t.store.Tokens(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]Token, 0, len(rows))
	for _, r := range rows {
		out = append(out, publicToken(r))
	}
	return out, nil
}

// Revoke ends a token, by ID or name; see TokenTTL. Unknown wraps
// solstice.ErrNotFound.
func (t *Tokens) Revoke(ctx context.Context, idOrName string) error {
	err := t.store.DeleteToken(ctx, idOrName)
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("%w: token %.80q", solstice.ErrNotFound, idOrName)
	}
	t.mu.Lock()
	clear(t.cached)
	t.mu.Unlock()
	return err
}

// role is that of a secret's token; an unknown one is Unauthenticated.
func (t *Tokens) role(ctx context.Context, secret string) (Role, error) {
	unknown := status.Error(codes.Unauthenticated, "the token is unknown, expired or revoked")
	if len(secret) > maxTokenBytes {
		return 0, unknown
	}
	h := hash(secret)
	begun := time.Now()
	t.mu.Lock()
	c, ok := t.cached[h]
	t.mu.Unlock()
	if ok && begun.Before(c.until) {
		return c.role, nil
	}
	row, err := t.store.UseToken(ctx, h)
	if errors.Is(err, store.ErrNotFound) {
		return 0, unknown
	}
	if err != nil {
		return 0, fmt.Errorf("%w: token not looked up: %w", errAway, err)
	}
	role, err := ParseRole(row.Role)
	if err != nil {
		return 0, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.cached) >= maxCached {
		clear(t.cached)
	}
	t.cached[h] = cachedRole{role, begun.Add(TokenTTL)}
	return role, nil
}

// hash needs no salt: a secret has 128 random bits.
func hash(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

func publicToken(r *store.Token) Token {
	role, _ := ParseRole(r.Role) // an unknown one is Nobody
	return Token{r.ID, r.Name, role, timeOf(r.CreatedAt), timeOf(r.ExpiresAt), timeOf(r.UsedAt)}
}

func timeOf(micros int64) time.Time {
	if micros == 0 {
		return time.Time{}
	}
	return time.UnixMicro(micros).UTC()
}

// firstName is the name of the token that First makes.
const firstName = "admin"

// First makes an admin token and writes it to a file of mode 0600, if there is
// no token: none can be made otherwise. Its secret is in a file beside it first,
// so that a crash leaves nothing that the next call does not bring to its end. Of
// several orchestrators that start at once one makes the token, and only its file
// appears. A secret whose token was revoked never comes back.
func (t *Tokens) First(ctx context.Context, file string) error {
	begun := file + ".new"
	have, err := t.List(ctx)
	if err != nil {
		return err
	}
	kept, err := os.ReadFile(begun)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	secret := strings.TrimSuffix(string(kept), "\n")
	if len(have) == 0 {
		if !secretForm.MatchString(secret) {
			secret = newSecret()
			if err := writeSecret(begun, secret+"\n"); err != nil {
				return err
			}
		}
		if _, err := t.create(ctx, firstName, Admin, 0, secret); err != nil && !errors.Is(err, ErrExists) { // another orchestrator's
			return err
		}
	} else if kept == nil {
		return nil
	}
	switch _, err := t.role(ctx, secret); {
	case status.Code(err) == codes.Unauthenticated:
		return os.Remove(begun)
	case err != nil:
		return err
	}
	return rename(begun, file)
}

// writeSecret makes a file appear with all of its content, durably.
func writeSecret(file, content string) (err error) {
	dir := filepath.Dir(file)
	f, err := os.CreateTemp(dir, ".token-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // gone already after the rename
	_, err = f.WriteString(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return rename(f.Name(), file)
}

// rename is durable.
func rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(to))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
