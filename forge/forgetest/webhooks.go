package forgetest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
)

var (
	errPanic  = errors.New("ParseWebhook panics")
	errSecret = errors.New("there is no secret now")
	errBody   = errors.New("the connection broke")
)

// hooks is what the checks of webhooks share.
type hooks struct {
	TB
	f Fixture
	w *Webhooks
}

func hooksOf(tb TB, f Fixture) hooks {
	tb.Helper()
	if f.Webhooks == nil || f.Webhooks.Request == nil {
		tb.Fatalf("Fixture.Webhooks is missing")
	}
	h := hooks{tb, f, f.Webhooks}
	if len(h.events()) == 0 {
		tb.Fatalf("Webhooks.Deliveries has none with a golden event")
	}
	return h
}

func (h hooks) secret() []byte {
	if h.w.Secret != nil {
		return h.w.Secret
	}
	return []byte("a secret of webhooks")
}

// events are the deliveries that become one.
func (h hooks) events() (all []Delivery) {
	for _, d := range h.w.Deliveries {
		if d.Golden != "" {
			all = append(all, d)
		}
	}
	return all
}

// signed is a delivery as the forge sends it.
func (h hooks) signed(d Delivery) *http.Request {
	return h.w.Request(h, d.Event, d.Body, h.secret())
}

// parse has the driver parse a request; its secret is that of all repositories.
func (h hooks) parse(what string, r *http.Request) (forge.Event, error) {
	return h.ask(what, r, func(context.Context, string) ([]byte, error) { return h.secret(), nil })
}

func (h hooks) ask(what string, r *http.Request, s forge.SecretFunc) (e forge.Event, err error) {
	h.Helper()
	defer func() {
		if p := recover(); p != nil {
			h.Errorf("%s: ParseWebhook panics: %v", what, p)
			e, err = forge.Event{}, errPanic
		}
	}()
	e, err = h.f.Forge.ParseWebhook(h.Context(), r, s)
	if err == nil {
		if bad := e.Validate(); bad != nil {
			h.Errorf("%s: the event is not valid: %v", what, bad)
		}
	}
	return e, err
}

func inJSON(e any) string {
	b, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return err.Error()
	}
	return string(b) + "\n"
}

// updating: the test has a flag -update, and it was given.
func updating() bool {
	f := flag.Lookup("update")
	return f != nil && f.Value.String() == "true"
}

func checkWebhookEvents(tb TB, f Fixture) {
	h := hooksOf(tb, f)
	for _, d := range h.events() {
		e, err := h.parse(d.Name, h.signed(d))
		if err != nil {
			tb.Errorf("%s: %v, want an event", d.Name, err)
			continue
		}
		if d.Repo != "" && e.Repo.FullName() != d.Repo {
			tb.Errorf("%s: an event of %q, want one of %q", d.Name, e.Repo.FullName(), d.Repo)
		}
		got := inJSON(e)
		if updating() {
			must(tb, "golden event", errors.Join(os.MkdirAll(filepath.Dir(d.Golden), 0o755), os.WriteFile(d.Golden, []byte(got), 0o644))) //nolint:gosec // test data
			continue
		}
		want, err := os.ReadFile(d.Golden)
		if err != nil || got != strings.ReplaceAll(string(want), "\r\n", "\n") {
			tb.Errorf("%s: the event is %swant that of %s:\n%s(%v; -update writes what is)", d.Name, got, d.Golden, want, err)
		}
	}
}

func checkWebhookErrors(tb TB, f Fixture) {
	h := hooksOf(tb, f)
	for _, d := range h.w.Deliveries {
		if d.Golden != "" {
			continue
		}
		if !errors.Is(d.Err, forge.ErrIgnored) && !errors.Is(d.Err, forge.ErrInvalid) {
			tb.Fatalf("Delivery %s: Err is %v, want ErrIgnored or ErrInvalid", d.Name, d.Err)
		}
		_, err := h.parse(d.Name, h.signed(d))
		wantErr(tb, d.Name, err, d.Err)
		if err != nil && err.Error() == d.Err.Error() {
			tb.Errorf("%s: the error %q does not say why", d.Name, err)
		}
	}
	for _, d := range h.events()[:1] {
		_, err := h.parse("an unknown event", h.w.Request(h, "no-such-event", d.Body, h.secret()))
		if err != nil { // where the body says what it is
			wantErr(tb, "an unknown event", err, forge.ErrIgnored, forge.ErrInvalid)
		}
	}
}

// headers are those that authenticate a request of this delivery, and whether they
// depend on the body.
func (h hooks) headers(d Delivery) (names []string, cover bool) {
	a, b := h.signed(d), h.w.Request(h, d.Event, d.Body, []byte("another secret"))
	names = h.w.SignedBy
	if names == nil {
		if c := h.signed(d); !maps.EqualFunc(a.Header, c.Header, slices.Equal[[]string]) {
			h.Fatalf("Webhooks.Request gives %v and %v for the same arguments: it has to give the same, or SignedBy to say which headers authenticate", a.Header, c.Header)
		}
		for name := range a.Header {
			if !slices.Equal(a.Header[name], b.Header[name]) {
				names = append(names, name)
			}
		}
	}
	if len(names) == 0 {
		h.Fatalf("no header of %s depends on the secret", d.Name)
	}
	c := h.w.Request(h, d.Event, append(bytes.Clone(d.Body), ' '), h.secret())
	for _, name := range names {
		cover = cover || c.Header.Get(name) != a.Header.Get(name)
	}
	return names, cover
}

// forgeries are deliveries with what others could make for a signature; thorough
// is with each byte of it changed.
func (h hooks) forgeries(d Delivery, thorough bool) map[string]*http.Request {
	names, cover := h.headers(d)
	other := []byte("another secret")
	all := map[string]*http.Request{"another secret": h.w.Request(h, d.Event, d.Body, other)}
	change := func(what string, f func(value string) string) {
		r := h.signed(d)
		changed := false
		for _, name := range names {
			was := r.Header.Get(name)
			if now := f(was); now != was {
				changed = true
				r.Header.Set(name, now)
			}
		}
		if changed {
			all[what] = r
		}
	}
	none := h.signed(d)
	for _, name := range names {
		none.Header.Del(name)
	}
	all["no signature"] = none
	change("an empty signature", func(string) string { return "" })
	change("half a signature", func(s string) string { return s[:len(s)/2] })
	change("a signature without its last byte", func(s string) string { return s[:max(0, len(s)-1)] })
	change("a signature and more", func(s string) string { return s + "0" })
	if cover {
		r, of := h.w.Request(h, d.Event, append(bytes.Clone(d.Body), ' '), h.secret()), h.signed(d)
		for _, name := range names {
			r.Header[http.CanonicalHeaderKey(name)] = of.Header.Values(name)
		}
		all["another body's signature"] = r
	}
	longest := 0
	for _, name := range names {
		longest = max(longest, len(h.signed(d).Header.Get(name)))
	}
	for i := range longest {
		if !thorough && i != longest-1 {
			continue
		}
		change(fmt.Sprintf("byte %d of the signature changed", i), func(s string) string {
			if i >= len(s) {
				return ""
			}
			return s[:i] + string(rune(s[i]&0x7f^1)) + s[i+1:]
		})
	}
	return all
}

// What is forged is said to be, whatever else is in it.
func checkWebhookForged(tb TB, f Fixture) {
	h := hooksOf(tb, f)
	first := h.events()[0].Name
	for _, d := range h.w.Deliveries {
		want := []error{forge.ErrSignature}
		if errors.Is(d.Err, forge.ErrInvalid) {
			want = append(want, forge.ErrInvalid) // so that there is nothing to verify
		}
		for what, r := range h.forgeries(d, d.Name == first) {
			what = d.Name + " with " + what
			_, err := h.parse(what, r)
			wantErr(tb, what, err, want...)
		}
	}
}

func checkWebhookSecret(tb TB, f Fixture) {
	h := hooksOf(tb, f)
	for _, d := range h.w.Deliveries {
		malformed := errors.Is(d.Err, forge.ErrInvalid)
		var asked []string
		_, err := h.ask(d.Name, h.signed(d), func(_ context.Context, repo string) ([]byte, error) {
			asked = append(asked, repo)
			return nil, errSecret
		})
		if malformed && len(asked) == 0 {
			wantErr(tb, d.Name, err, forge.ErrInvalid)
			continue
		}
		wantErr(tb, d.Name+" when there is no secret", err, errSecret)
		if len(asked) == 0 || slices.ContainsFunc(asked, func(repo string) bool { return repo != d.Repo }) {
			tb.Errorf("%s: the secret is asked for %q, want %q", d.Name, asked, d.Repo)
		}
		for what, secret := range map[string][]byte{"no secret": nil, "an empty secret": {}} {
			what = d.Name + " with " + what
			e, err := h.ask(what, h.w.Request(h, d.Event, d.Body, nil), func(context.Context, string) ([]byte, error) { return secret, nil })
			if err == nil || errors.Is(err, forge.ErrIgnored) {
				tb.Errorf("%s: %v, %v, want an error that accepts nothing", what, e.Kind, err)
			}
		}
	}
}

func checkWebhookReplay(tb TB, f Fixture) {
	h := hooksOf(tb, f)
	for _, d := range h.events() {
		r := h.signed(d)
		again := r.Clone(tb.Context())
		again.Body = io.NopCloser(bytes.NewReader(d.Body))
		a, err := h.parse(d.Name, r)
		b, errAgain := h.parse(d.Name+" again", again)
		if err != nil || errAgain != nil || inJSON(a) != inJSON(b) {
			tb.Errorf("%s: %v, %sagain: %v, %s", d.Name, err, inJSON(a), errAgain, inJSON(b))
		}
	}
}

// broken is a body that breaks off.
type broken struct{ io.Reader }

func (b broken) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		err = errBody
	}
	return n, err
}

func checkWebhookTruncated(tb TB, f Fixture) {
	h := hooksOf(tb, f)
	const cuts = 16
	for _, d := range h.events() {
		_, cover := h.headers(d)
		for i := range cuts {
			cut := d
			cut.Body = d.Body[:len(d.Body)*i/cuts]
			what := fmt.Sprintf("%s, %d bytes of %d", d.Name, len(cut.Body), len(d.Body))
			if _, err := h.parse(what, h.signed(cut)); json.Valid(d.Body) {
				wantErr(tb, what, err, forge.ErrInvalid)
			}
			r := h.signed(d)
			r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(cut.Body)), int64(len(cut.Body))
			if _, err := h.parse(what+" with the signature of all", r); cover {
				wantErr(tb, what+" with the signature of all", err, forge.ErrSignature, forge.ErrInvalid)
			}
		}
		r := h.signed(d)
		r.Body = io.NopCloser(broken{bytes.NewReader(d.Body)})
		if _, err := h.parse(d.Name, r); err == nil || errors.Is(err, forge.ErrIgnored) {
			tb.Errorf("%s: %v, though its body could not be read to its end", d.Name, err)
		}
	}
}

// endless is a body and then spaces, more of them than anybody should read.
type endless struct {
	body []byte
	read int64
}

func (e *endless) Read(p []byte) (int, error) {
	if e.read > 2*forge.MaxWebhookBytes {
		return 0, io.EOF
	}
	if len(e.body) == 0 {
		e.body = spaces
	}
	n := copy(p, e.body)
	e.body = e.body[n:]
	e.read += int64(n)
	return n, nil
}

var spaces = bytes.Repeat([]byte(" "), 64<<10)

func checkWebhookOversized(tb TB, f Fixture) {
	h := hooksOf(tb, f)
	d := h.events()[0]
	for what, size := range map[string]int64{"a body of unknown size": -1, "a body of 1 GiB": 1 << 30} {
		r, body := h.signed(d), &endless{body: d.Body}
		r.Body, r.ContentLength = io.NopCloser(body), size
		_, err := h.parse(what, r)
		wantErr(tb, what, err, forge.ErrTooLarge)
		if body.read > forge.MaxWebhookBytes+1<<20 {
			tb.Errorf("%s: %d bytes of it were read", what, body.read)
		}
	}
}

func checkWebhookContext(tb TB, f Fixture) {
	h := hooksOf(tb, f)
	ctx, cancel := context.WithCancel(tb.Context())
	cancel()
	d := h.events()[0]
	_, err := f.Forge.ParseWebhook(ctx, h.signed(d), func(context.Context, string) ([]byte, error) { return h.secret(), nil })
	wantErr(tb, "ParseWebhook with a cancelled context", err, context.Canceled)
}

// substitutes stand in for each value of a body in turn.
var substitutes = []any{
	nil, -1, json.Number("1e400"), "", "../../x", "--upload-pack=x\n", strings.Repeat("x", 4096), []any{}, []any{nil}, map[string]any{}, true,
}

// mutate calls yield for each value within v, with a function that replaces it.
func mutate(v any, set func(any), yield func(set func(any), was any)) {
	yield(set, v)
	switch v := v.(type) {
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(v)) {
			mutate(v[k], func(x any) { v[k] = x }, yield)
		}
	case []any:
		for i := range v {
			mutate(v[i], func(x any) { v[i] = x }, yield)
		}
	}
}

// Whoever has the secret may still send anything.
func checkWebhookHostile(tb TB, f Fixture) {
	h := hooksOf(tb, f)
	try := func(d Delivery, what string, body []byte) {
		what = d.Name + " with " + what
		want := []error{forge.ErrInvalid, forge.ErrIgnored}
		if h.w.Secret != nil { // of another repository, or none
			want = append(want, forge.ErrSignature)
		}
		if _, err := h.parse(what, h.w.Request(h, d.Event, body, h.secret())); err != nil {
			wantErr(tb, what, err, want...)
		}
	}
	const tries = 1500
	events := h.events()
	seen := map[string]bool{}
	for n, d := range events {
		for _, body := range []string{"", "null", "[]", "{}", `"x"`, "{", "\xff\xfe", "{}{}", strings.Repeat("[", 20000), `{"a":` + strings.Repeat(`{"a":`, 20000)} {
			if !seen[d.Event] {
				try(d, fmt.Sprintf("the body %.20q", body), []byte(body))
			}
		}
		seen[d.Event] = true
		decoder := json.NewDecoder(bytes.NewReader(d.Body))
		decoder.UseNumber()
		var v any
		if decoder.Decode(&v) != nil {
			continue // in another format
		}
		values := 0
		root := func(x any) { v = x }
		mutate(v, root, func(func(any), any) { values += len(substitutes) })
		each := max(1, values*len(events)/tries) // so that all deliveries have their share
		i := n                                   // and not all the same places
		mutate(v, root, func(set func(any), was any) {
			for _, s := range substitutes {
				if i++; i%each != 0 {
					continue
				}
				set(s)
				body, err := json.Marshal(v)
				set(was)
				must(tb, "mutation", err)
				try(d, fmt.Sprintf("%.80v replaced by %.20v", was, s), body)
			}
		})
	}
}
