// Package runpages serves what the links of statuses lead to: a page of a run with its
// jobs, and the jobs' logs as text, which go on while a job runs.
//
// Whoever has a run's link may look at that run and at no other: the link has a key,
// which is made of the run's ID and a secret of the database. So a run is as visible as
// the statuses that link to it. Keys do not change, and end with the run's retention.
//
//	pages, err := runpages.Open(ctx, db, runpages.Config{URL: "https://ci.example.org"})
//	cfg.TargetURL = pages.URL
//	eng, err := solstice.New(cfg)
//	mux.Handle("/runs/", pages.Handler(ctx, eng))
package runpages

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"errors"
	"fmt"
	"html/template"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/logtext"
)

// ErrInvalid: a configuration that cannot be.
var ErrInvalid = errors.New("runpages: invalid")

// Config of Pages.
type Config struct {
	// URL is where people reach the root of Handler's server, such as
	// https://ci.example.org; it may have a path, which a proxy takes away. Required.
	URL string
	// MaxRequests at once, those that follow a log among them; 128. Others are told
	// to come again.
	MaxRequests int
	Logger      *slog.Logger // nil: silent
}

// writeTimeout is for how long a reader may take nothing.
const writeTimeout = 30 * time.Second

// Pages are links and what they lead to; safe for concurrent use.
type Pages struct {
	cfg    Config
	base   string
	secret []byte
	slots  chan struct{}
}

// Open gives the pages of a database that is migrated. The error wraps ErrInvalid, or
// says what is wrong with the database.
func Open(ctx context.Context, db *bun.DB, cfg Config) (*Pages, error) {
	u, err := url.Parse(cfg.URL)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("%w: URL %q: want one like https://ci.example.org", ErrInvalid, cfg.URL)
	}
	if cfg.MaxRequests < 0 {
		return nil, fmt.Errorf("%w: MaxRequests is negative", ErrInvalid)
	}
	if cfg.MaxRequests == 0 {
		cfg.MaxRequests = 128
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s, err := store.New(ctx, db, store.Options{})
	if err != nil {
		return nil, fmt.Errorf("runpages: open state: %w", err)
	}
	secret, err := s.Secret(ctx, "runpages")
	if err != nil {
		return nil, fmt.Errorf("runpages: %w", err)
	}
	return &Pages{cfg: cfg, base: strings.TrimRight(cfg.URL, "/"), secret: secret, slots: make(chan struct{}, cfg.MaxRequests)}, nil
}

// key is what lets people look at a run: 128 bits.
func (p *Pages) key(runID string) string {
	mac := hmac.New(sha256.New, p.secret)
	mac.Write([]byte(runID))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil)[:16])
}

// URL is the link to a run's page or, where a job is given, to its log: what
// solstice.Config.TargetURL wants.
func (p *Pages) URL(runID, jobID string) string {
	u := p.base + "/runs/" + url.PathEscape(runID) + "/" + p.key(runID)
	if jobID != "" {
		u += "/" + url.PathEscape(jobID)
	}
	return u
}

// Handler serves /runs/…; ctx ends those that follow a log.
func (p *Pages) Handler(ctx context.Context, e *solstice.Engine) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /runs/{run}/{key}", func(w http.ResponseWriter, r *http.Request) { p.serve(ctx, w, r, e, p.page) })
	mux.HandleFunc("GET /runs/{run}/{key}/{job}", func(w http.ResponseWriter, r *http.Request) { p.serve(ctx, w, r, e, p.log) })
	return mux
}

// serve lets in who has the key, and has a panic or an error cost one request.
func (p *Pages) serve(ctx context.Context, w http.ResponseWriter, r *http.Request, e *solstice.Engine, show func(context.Context, http.ResponseWriter, *http.Request, *solstice.Engine) error) {
	h := w.Header()
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'sha256-"+styleSum+"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer") // which has the key
	h.Set("Cache-Control", "no-store")
	h.Set("X-Robots-Tag", "noindex")
	if !hmac.Equal([]byte(r.PathValue("key")), []byte(p.key(r.PathValue("run")))) {
		http.NotFound(w, r) // as for a run that never was
		return
	}
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	default:
		h.Set("Retry-After", "5")
		http.Error(w, "too many people look at once; come again", http.StatusServiceUnavailable)
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.Context(), cancel)()
	err := show(ctx, w, r, e)
	switch {
	case err == nil, ctx.Err() != nil:
	case errors.Is(err, solstice.ErrRemoved):
		http.Error(w, "it was here, and has been removed after a while", http.StatusGone)
	case errors.Is(err, solstice.ErrNotFound):
		http.NotFound(w, r)
	default:
		p.cfg.Logger.WarnContext(ctx, "page not shown", "run_id", r.PathValue("run"), "error", err)
		http.Error(w, "it cannot be shown just now", http.StatusServiceUnavailable)
	}
}

//go:embed run.html
var page string

//go:embed style.css
var style string

var (
	styleSum = func() string {
		sum := sha256.Sum256([]byte(style))
		return base64.StdEncoding.EncodeToString(sum[:])
	}()
	pageTemplate = template.Must(template.New("run").Funcs(template.FuncMap{
		"plain": logtext.Plain,
		"style": func() template.CSS { return template.CSS(style) }, //nolint:gosec // ours
		"took":  took,
		"short": func(commit string) string { return commit[:min(len(commit), 12)] },
	}).Parse(page))
)

// took is for how long something ran, or has run until now.
func took(from, to time.Time) string {
	if from.IsZero() {
		return ""
	}
	if to.IsZero() {
		to = time.Now()
	}
	return to.Sub(from).Round(time.Second).String()
}

func (p *Pages) page(ctx context.Context, w http.ResponseWriter, r *http.Request, e *solstice.Engine) error {
	run, err := e.GetRun(ctx, r.PathValue("run"))
	if err != nil {
		return err
	}
	type job struct {
		solstice.Job
		URL string
	}
	view := struct {
		solstice.Run
		Jobs    []job
		Rerun   string
		Refresh bool
	}{Run: run, Refresh: !run.State.Terminal()}
	for _, j := range run.Jobs {
		v := job{Job: j}
		if j.Attempts > 0 || j.CopiedFrom != "" {
			v.URL = p.URL(run.ID, j.ID)
		}
		view.Jobs = append(view.Jobs, v)
	}
	if run.RerunOf != "" {
		view.Rerun = p.URL(run.RerunOf, "")
	}
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, view); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, err = b.WriteTo(w)
	return ignoreGone(err)
}

// log is a job's log as text. What is wrong after its beginning is said at its end.
func (p *Pages) log(ctx context.Context, w http.ResponseWriter, r *http.Request, e *solstice.Engine) error {
	job, err := e.Job(ctx, r.PathValue("job"))
	if err == nil && job.RunID != r.PathValue("run") {
		err = fmt.Errorf("%w: job %s of this run", solstice.ErrNotFound, job.ID)
	}
	if err != nil {
		return err
	}
	out := &flusher{w: w, c: http.NewResponseController(w)}
	begun := false
	begin := func() {
		if !begun {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			begun = true
			out.flush() // so that a reader sees that something is to come
		}
	}
	if r.Method == http.MethodHead {
		begin()
		return nil
	}
	if !job.State.Terminal() {
		begin()
	}
	text := logtext.NewWriter(out, false)
	for c, err := range e.FollowJob(ctx, job.ID) {
		if err != nil && !begun {
			return err
		}
		begin()
		switch {
		case err != nil && ctx.Err() == nil:
			p.cfg.Logger.WarnContext(ctx, "log not shown to its end", "job_id", job.ID, "error", err)
			err = errors.Join(text.Close(), say(out, "the rest cannot be shown just now"))
		case err != nil:
		case c.Begin && c.Attempt.Number > 1:
			err = errors.Join(text.Close(), say(out, fmt.Sprintf("attempt %d", c.Attempt.Number)))
		default:
			_, err = text.Write(c.Chunk.Data)
			out.flush()
		}
		if err != nil {
			return nil // the reader is gone, or told
		}
	}
	begin()
	err = text.Close()
	if job, jerr := e.Job(ctx, job.ID); err == nil && jerr == nil {
		what := string(job.State)
		if job.Reason != "" {
			what += ": " + logtext.Plain(job.Reason)
		}
		err = say(out, what)
	}
	out.flush()
	return ignoreGone(err)
}

// say writes a line that is not the job's.
func say(w io.Writer, what string) error {
	_, err := io.WriteString(w, "=== "+what+" ===\n")
	return err
}

// ignoreGone is for readers who went away: nobody is left to be told.
func ignoreGone(error) error { return nil }

// flusher bounds how long a reader may take nothing.
type flusher struct {
	w io.Writer
	c *http.ResponseController
}

// Write implements io.Writer.
func (f *flusher) Write(b []byte) (int, error) {
	_ = f.c.SetWriteDeadline(time.Now().Add(writeTimeout)) // not every server has them
	return f.w.Write(b)
}

func (f *flusher) flush() {
	_ = f.c.SetWriteDeadline(time.Now().Add(writeTimeout))
	_ = f.c.Flush() // a failure shows at the next write
}
