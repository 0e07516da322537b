package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
)

// outcome is what a request is answered with.
type outcome struct {
	status int
	label  string // of the metric
	text   string // for people at the forge
	retry  bool
}

var (
	errBusy = outcome{http.StatusServiceUnavailable, "busy", "too many webhooks at once; deliver it again", true}
	errBody = outcome{http.StatusRequestEntityTooLarge, "too_large", "the body is too large", false}
	errSlow = outcome{http.StatusRequestTimeout, "slow", "the body took too long", false}

	errCutOff = outcome{http.StatusBadRequest, "cut_off", "the body could not be read", false}
)

// waits is how long a webhook that has arrived waits for those before it, as while the
// database is slow: forges wait for 10 s, and some deliver nothing again by themselves.
const waits = 5 * time.Second

// ServeHTTP takes a webhook at Prefix + NAME. It answers 202 for what it has written
// down, also where that starts nothing; 401 for a wrong signature; 400 or 413 for
// what it does not understand; 503 for what should be delivered again.
func (in *Integration) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Path, in.cfg.Prefix)
	f, ok := in.cfg.Forges[name]
	if !ok || f.Secret == nil || !f.Forge.Capabilities().Webhooks {
		http.NotFound(w, r)
		return
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "webhooks come by POST", http.StatusMethodNotAllowed)
		return
	}
	o := in.take(w, r, name, f)
	in.webhooks.Add(r.Context(), 1, metric.WithAttributes(attribute.String("forge", name), attribute.String("outcome", o.label)))
	if o.retry {
		w.Header().Set("Retry-After", "5")
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(o.status)
	_, _ = io.WriteString(w, o.text+"\n")
}

func (in *Integration) take(w http.ResponseWriter, r *http.Request, name string, f Instance) outcome {
	// Bounds first: nothing has been believed yet.
	body, place, o := in.arrive(w, r)
	if place == nil {
		w.Header().Set("Connection", "close") // instead of waiting for the rest
		return o
	}
	defer place.leave()
	select {
	case in.slots <- struct{}{}:
	case <-time.After(waits):
		return errBusy
	case <-r.Context().Done():
		return errCutOff
	}
	defer func() { <-in.slots }()

	ctx, span := in.tracer.Start(r.Context(), "webhook", trace.WithNewRoot(), trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(attribute.String("forge", name)))
	defer span.End()
	o, err := in.handle(ctx, r.Header, body, name, f)
	span.SetAttributes(attribute.String("outcome", o.label))
	if err != nil {
		span.SetStatus(codes.Error, o.label)
		in.complain(ctx, name, o, err)
	}
	return o
}

// arrive reads the body, within the time and the room that there is for it, and gives
// the place that it has; nil: it has not arrived, and why.
func (in *Integration) arrive(w http.ResponseWriter, r *http.Request) ([]byte, *guest, outcome) {
	if r.ContentLength > in.cfg.MaxBodyBytes {
		return nil, nil, errBody
	}
	c := http.NewResponseController(w)
	if err := c.SetReadDeadline(time.Now().Add(in.cfg.BodyTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return nil, nil, errCutOff
	}
	g := in.room.enter(func() { _ = c.SetReadDeadline(time.Now()) })
	if g == nil {
		return nil, nil, errBusy
	}
	size := r.ContentLength
	if size < 0 { // it is not said
		size = in.cfg.MaxBodyBytes
	}
	body, err := read(http.MaxBytesReader(w, r.Body, in.cfg.MaxBodyBytes), size, g)
	o := errCutOff
	var tooLarge *http.MaxBytesError
	switch {
	case !g.arrived(), errors.Is(err, errNoRoom):
		o = errBusy
	case err == nil:
		_ = c.SetReadDeadline(time.Time{})
		return body, g, outcome{}
	case errors.As(err, &tooLarge):
		o = errBody
	case errors.Is(err, os.ErrDeadlineExceeded):
		o = errSlow
	}
	g.leave()
	return nil, nil, o
}

var errNoRoom = errors.New("integration: no room for the body")

// read reads a body of at most size bytes into about as much memory as has arrived of
// it.
func read(r io.Reader, size int64, g *guest) ([]byte, error) {
	const first = 8 << 10
	var b []byte
	for {
		if have := int64(len(b)); len(b) == cap(b) {
			more := min(max(first, have), size+1-have) // one more shows the end
			if !g.grow(more) {
				return nil, errNoRoom
			}
			b = append(make([]byte, 0, have+more), b...)
		}
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if errors.Is(err, io.EOF) {
			return b, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// parse asks the driver, whose panic costs one request.
func parse(ctx context.Context, f Instance, header http.Header, body []byte) (ev forge.Event, err error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "/", bytes.NewReader(body))
	if err != nil {
		return forge.Event{}, err
	}
	r.Header = header.Clone()
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("integration: the driver panicked: %v", p)
		}
	}()
	return f.Forge.ParseWebhook(ctx, r, f.Secret)
}

// ignoredBody is how much of the body is kept of what is ignored: enough to see why.
const ignoredBody = 64 << 10

func (in *Integration) handle(ctx context.Context, header http.Header, body []byte, name string, f Instance) (outcome, error) {
	ev, err := parse(ctx, f, header, body)
	sum := sha256.Sum256(body)
	d := &store.Delivery{
		ID: uuid.Must(uuid.NewV7()).String(), Forge: name, Delivery: ev.Delivery, Kind: string(ev.Kind), Repo: ev.Repo.FullName(),
		State: store.DeliveryAccepted, Headers: headers(header), Body: body, BodySum: hex.EncodeToString(sum[:]),
	}
	ignored := ""
	switch {
	case errors.Is(err, forge.ErrSignature):
		return outcome{http.StatusUnauthorized, "signature", "the signature does not verify: the secret is another one here", false}, err
	case errors.Is(err, forge.ErrIgnored):
		ignored = err.Error()
	case errors.Is(err, forge.ErrTooLarge):
		return errBody, err
	case errors.Is(err, forge.ErrInvalid):
		return outcome{http.StatusBadRequest, "invalid", err.Error(), false}, err
	case err != nil:
		return outcome{http.StatusServiceUnavailable, "failed", "it cannot be taken just now", true}, err
	case ev.Kind == forge.KindPing, ev.Kind == forge.KindInstallation:
		ignored = "there is nothing to do for " + string(ev.Kind)
	case !f.allows(ev.Repo):
		ignored = ev.Repo.FullName() + " is not on the list of those that may start something here"
	}
	var msgs []store.OutboxMessage
	var told *store.Told
	if ignored != "" {
		d.State, d.Reason = store.DeliveryIgnored, ignored
		d.Body = body[:min(len(body), ignoredBody)]
	} else {
		if d.Event, err = json.Marshal(ev); err == nil {
			msgs, err = request(ctx, name, ev, "")
		}
		if err == nil {
			told, err = toldOf(f, ev)
		}
		if err != nil {
			return outcome{http.StatusBadRequest, "invalid", err.Error(), false}, err
		}
	}
	if err := in.store.InsertDelivery(ctx, d, in.cfg.DuplicateBody, told, msgs); err != nil {
		return outcome{http.StatusServiceUnavailable, "failed", "it cannot be written down just now", true}, err
	}
	in.kicked()
	text := string(d.State) + " as " + d.ID
	if d.Reason != "" {
		text += ": " + d.Reason
	}
	return outcome{http.StatusAccepted, string(d.State), text, false}, nil
}

func (in *Integration) kicked() {
	select {
	case in.kick <- struct{}{}:
	default:
	}
}

// allows compares with the allow-list.
func (i Instance) allows(r forge.Repo) bool {
	if i.AllowAll {
		return true
	}
	full := strings.ToLower(r.FullName())
	for _, a := range i.Allow {
		a = strings.ToLower(a)
		if full == a || strings.HasPrefix(full, a+"/") {
			return true
		}
	}
	return false
}

// maxPaths is how many changed paths go with a message: of more the engine asks.
const maxPaths = 3000

// request is the message that asks for the runs of an event; replay, if not empty,
// makes it another one than that of its delivery.
func request(ctx context.Context, name string, ev forge.Event, replay string) ([]store.OutboxMessage, error) {
	r := messages.RunRequest{Forge: name, Repo: ev.Repo, Commit: ev.Commit, Ref: ev.Ref, Event: ev}
	if len(r.Event.ChangedPaths) > maxPaths {
		r.Event.ChangedPaths = nil
	}
	const most = 64 << 10
	r.Event.Message = strings.ToValidUTF8(r.Event.Message[:min(len(r.Event.Message), most)], "")
	if replay != "" {
		r.IdempotencyKey, r.Event.Delivery = "replay/"+replay, ""
	}
	m, err := messages.Encode(r)
	if err != nil {
		return nil, err
	}
	propagation.TraceContext{}.Inject(ctx, propagation.MapCarrier(m.Attributes))
	attributes, err := json.Marshal(m.Attributes)
	if err != nil {
		return nil, err
	}
	return []store.OutboxMessage{{
		Key: "runrequest/" + name + "/" + ev.Repo.FullName(), Topic: messages.TopicRunRequest, ContentType: m.ContentType, Attributes: attributes, Body: m.Body,
	}}, nil
}

// headers keeps what says which webhook it was, and nothing that authorises.
func headers(h http.Header) json.RawMessage {
	kept := map[string]string{}
	for name, values := range h {
		lower := strings.ToLower(name)
		of := strings.HasPrefix(lower, "x-") || strings.HasPrefix(lower, "webhook-") || lower == "content-type" || lower == "user-agent"
		for _, secret := range []string{"signature", "token", "secret", "auth", "cookie", "key", "forwarded"} {
			of = of && !strings.Contains(lower, secret)
		}
		if of && len(kept) < 32 && len(values) > 0 && len(values[0]) <= 512 {
			kept[name] = values[0]
		}
	}
	b, _ := json.Marshal(kept) // of strings
	return b
}

// complain says what is wrong, at most once a second and forge: forged requests come
// in floods.
func (in *Integration) complain(ctx context.Context, name string, o outcome, err error) {
	in.mu.Lock()
	c := in.complaints[name]
	if time.Since(c.last) < time.Second {
		c.more++
		in.complaints[name] = c
		in.mu.Unlock()
		return
	}
	in.complaints[name] = complaint{last: time.Now()}
	in.mu.Unlock()
	in.log.WarnContext(ctx, "webhook not taken", "forge", name, "outcome", o.label, "error", err, "others_before", c.more)
}

type complaint struct {
	last time.Time
	more int
}
