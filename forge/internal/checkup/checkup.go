// Package checkup has what drivers share in saying whether their forge is set up.
package checkup

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/hook"
)

// List collects findings.
type List []forge.Finding

// Fine says that something is as it should be.
func (l *List) Fine(format string, args ...any) {
	l.add(forge.LevelNotice, "", format, args...)
}

// Unseen says that something cannot be seen with these credentials.
func (l *List) Unseen(advice, format string, args ...any) {
	l.add(forge.LevelNotice, advice, format, args...)
}

// Warn says that something is likely to be wrong, or will be.
func (l *List) Warn(advice, format string, args ...any) {
	l.add(forge.LevelWarning, advice, format, args...)
}

// Fail says that something does not work.
func (l *List) Fail(advice, format string, args ...any) {
	l.add(forge.LevelFailure, advice, format, args...)
}

func (l *List) add(level forge.Level, advice, format string, args ...any) {
	what := strings.TrimRight(hook.Line(fmt.Sprintf(format, args...)), ".") // it may end with a forge's words
	*l = append(*l, forge.Finding{Level: level, What: what, Advice: advice})
}

// Down reports whether err says that the forge cannot be asked, for any call, and
// if so adds that.
func (l *List) Down(base string, err error) bool {
	if !errors.Is(err, forge.ErrUnavailable) {
		return false
	}
	advice := "see that this machine reaches it (name, network, proxy, certificate), that its address is right, and that it works"
	var retry *forge.RetryError
	if errors.As(err, &retry) {
		advice = fmt.Sprintf("it is asked too often: try again in %s", retry.After.Round(time.Second))
	}
	l.Fail(advice, "%s cannot be asked: %v", base, err)
	return true
}

// maxSkew is how far a clock may be off: GitHub refuses what was signed a minute
// in the future.
const maxSkew = 30 * time.Second

// Skew is how far our clock is ahead of the forge's, by the time that an answer
// has; ok is false where it has none.
func Skew(h http.Header, now time.Time) (ahead time.Duration, ok bool) {
	t, err := http.ParseTime(h.Get("Date"))
	return now.Sub(t).Round(time.Second), err == nil
}

// Clock warns of a clock that is wrong, and reports whether it is.
func (l *List) Clock(h http.Header, now time.Time) bool {
	ahead, ok := Skew(h, now)
	if !ok || ahead.Abs() <= maxSkew {
		return false
	}
	word := "ahead of"
	if ahead < 0 {
		word = "behind"
	}
	l.Warn("have the time of this machine set by NTP", "the clock of this machine is %s %s the forge's", ahead.Abs(), word)
	return true
}

// soon is when the end of credentials is worth a warning.
const soon = 14 * 24 * time.Hour

// Ends says when credentials end.
func (l *List) Ends(what string, at, now time.Time) {
	const advice = "make a new one, and put it in the place of the old one"
	day := at.UTC().Format("2006-01-02 15:04 MST")
	switch left := at.Sub(now); {
	case left <= 0:
		l.Fail(advice, "%s ended at %s", what, day)
	case left < soon:
		l.Warn(advice, "%s ends at %s", what, day)
	default:
		l.Fine("%s ends at %s", what, day)
	}
}

// Hook is a webhook of a forge.
type Hook struct {
	URL        string
	Inactive   string   // why; empty: it is active
	NotJSON    bool     // another content type
	NoSecret   bool     // as far as the forge says
	Unverified bool     // the certificate of the receiver is not looked at
	Missing    []string // events that it should send, as people see them
	Last       string   // how its last delivery failed; empty: it did not, as far as the forge says
}

// Hooks looks for the one that goes to want. Elsewhere is where else it may be,
// when it is none of all.
func (l *List) Hooks(of, want, elsewhere string, all []Hook) {
	found := slices.DeleteFunc(slices.Clone(all), func(h Hook) bool { return !SameURL(h.URL, want) })
	if len(found) == 0 {
		what := fmt.Sprintf("no webhook of %s goes to %s", of, want)
		if near := near(all, want); near != "" {
			what += ", but there is one to " + near
		}
		l.Warn("add one to the repository, unless "+elsewhere, "%s", what)
		return
	}
	if len(found) > 1 {
		l.Warn("remove all but one: what arrives twice is looked at twice", "%d webhooks of %s go to %s", len(found), of, want)
	}
	for _, h := range found {
		l.hook("the webhook of "+of, h)
	}
}

// Hook looks at the only one that there is.
func (l *List) Hook(what, want string, h Hook) {
	if !SameURL(h.URL, want) {
		l.Fail("set its URL to "+want, "%s goes to %s instead of %s", what, Public(h.URL), want)
		return
	}
	l.hook(what, h)
}

func (l *List) hook(what string, h Hook) {
	before := len(*l)
	if h.Inactive != "" {
		l.Fail("activate it in its settings, and see why it was deactivated", "%s is not active: %s", what, h.Inactive)
	}
	if h.NotJSON {
		l.Fail("set its content type to application/json", "%s sends forms instead of JSON", what)
	}
	if h.NoSecret {
		l.Fail("set the secret that is configured here", "%s has no secret, so what it sends is refused", what)
	}
	if len(h.Missing) > 0 {
		l.Fail("select them in its settings", "%s does not send the events %s", what, strings.Join(h.Missing, ", "))
	}
	if h.Unverified {
		l.Warn("switch the verification of certificates on", "%s does not look at our certificate", what)
	}
	if h.Last != "" {
		l.Warn("see what it says in its settings and here (solstice deliveries list), and deliver it again", "what %s sent last did not arrive: %s", what, h.Last)
	}
	if len(*l) == before {
		l.Fine("%s goes to %s and sends what is needed", what, Public(h.URL))
	}
}

// Missing are those of want that there are not.
func Missing(want, have []string) []string {
	return slices.DeleteFunc(slices.Clone(want), func(s string) bool { return slices.Contains(have, s) })
}

// SameURL compares URLs, whatever the case of their hosts and a slash at the end.
func SameURL(a, b string) bool {
	u, err := url.Parse(a)
	v, errToo := url.Parse(b)
	return err == nil && errToo == nil && u.Scheme == v.Scheme && strings.EqualFold(u.Host, v.Host) &&
		strings.TrimRight(u.Path, "/") == strings.TrimRight(v.Path, "/") && u.RawQuery == v.RawQuery
}

// near is the webhook that may be meant: of the same host or path.
func near(all []Hook, want string) string {
	w, err := url.Parse(want)
	if err != nil {
		return ""
	}
	for _, h := range all {
		if u, err := url.Parse(h.URL); err == nil && (strings.EqualFold(u.Host, w.Host) || len(w.Path) > 1 && u.Path == w.Path) {
			return Public(h.URL)
		}
	}
	return ""
}

// Public is a URL without what may be a secret in it: user, query, fragment.
func Public(raw string) string {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" {
		return "nowhere"
	}
	return hook.Line((&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String())
}

// WebhookURL reports whether webhooks are to be looked for, and can be.
func (l *List) WebhookURL(want string) bool {
	if want == "" {
		return false
	}
	if hook.WebURL(want) == "" {
		l.Fail("say where webhooks arrive: https://ci.example.org/webhooks/NAME", "the address of webhooks is no http or https URL: %q", Public(want))
		return false
	}
	return true
}
