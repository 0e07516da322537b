package checkup_test

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/checkup"
)

func TestFindings(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	const want = "https://ci.example.org/webhooks/x"
	header := func(t time.Time) http.Header { return http.Header{"Date": {t.Format(http.TimeFormat)}} }
	for name, tc := range map[string]struct {
		add   func(*checkup.List)
		level forge.Level // empty: nothing
		says  string
	}{
		"down":           {func(l *checkup.List) { l.Down("x", fmt.Errorf("%w: y", forge.ErrUnavailable)) }, forge.LevelFailure, "x cannot be asked"},
		"a limit":        {func(l *checkup.List) { l.Down("x", &forge.RetryError{After: 7e9, Err: errors.New("y")}) }, forge.LevelFailure, "try again in 7s"},
		"not down":       {func(l *checkup.List) { l.Down("x", forge.ErrPermission) }, "", ""},
		"the clock":      {func(l *checkup.List) { l.Clock(header(now.Add(-20*time.Second)), now) }, "", ""},
		"no date":        {func(l *checkup.List) { l.Clock(nil, now) }, "", ""},
		"a clock ahead":  {func(l *checkup.List) { l.Clock(header(now.Add(-time.Hour)), now) }, forge.LevelWarning, "1h0m0s ahead"},
		"a clock behind": {func(l *checkup.List) { l.Clock(header(now.Add(time.Hour)), now) }, forge.LevelWarning, "1h0m0s behind"},
		"ended":          {func(l *checkup.List) { l.Ends("x", now, now) }, forge.LevelFailure, "x ended"},
		"ends soon":      {func(l *checkup.List) { l.Ends("x", now.Add(time.Hour), now) }, forge.LevelWarning, "x ends at 2026-01-02"},
		"ends late":      {func(l *checkup.List) { l.Ends("x", now.AddDate(1, 0, 0), now) }, forge.LevelNotice, "x ends at 2027-01-02"},
		"no webhook":     {func(l *checkup.List) { l.Hooks("x", want, "", nil) }, forge.LevelWarning, "no webhook of x goes to"},
		"one elsewhere": {func(l *checkup.List) {
			l.Hooks("x", want, "", []checkup.Hook{{URL: "https://u:hunter2@ci.example.org/y?z=hunter2#hunter2"}})
		}, forge.LevelWarning, "one to https://ci.example.org/y"},
		"one of others": {func(l *checkup.List) {
			l.Hooks("x", want, "", []checkup.Hook{{URL: "https://chat.example.com/hunter2"}})
		}, forge.LevelWarning, "no webhook of x"},
		"another's path": {func(l *checkup.List) {
			l.Hooks("x", want, "", []checkup.Hook{{URL: "http://old.example.org/webhooks/x"}})
		}, forge.LevelWarning, "one to http://old"},
		"a good one": {func(l *checkup.List) {
			l.Hooks("x", want, "", []checkup.Hook{{URL: "https://CI.example.org/webhooks/x/"}})
		}, forge.LevelNotice, "sends what is needed"},
		"inactive":        {func(l *checkup.List) { l.Hooks("x", want, "", []checkup.Hook{{URL: want, Inactive: "y"}}) }, forge.LevelFailure, "not active: y"},
		"forms":           {func(l *checkup.List) { l.Hook("x", want, checkup.Hook{URL: want, NotJSON: true}) }, forge.LevelFailure, "application/json"},
		"no secret":       {func(l *checkup.List) { l.Hook("x", want, checkup.Hook{URL: want, NoSecret: true}) }, forge.LevelFailure, "no secret"},
		"events":          {func(l *checkup.List) { l.Hook("x", want, checkup.Hook{URL: want, Missing: []string{"a", "b"}}) }, forge.LevelFailure, "events a, b"},
		"unverified":      {func(l *checkup.List) { l.Hook("x", want, checkup.Hook{URL: want, Unverified: true}) }, forge.LevelWarning, "certificate"},
		"did not arrive":  {func(l *checkup.List) { l.Hook("x", want, checkup.Hook{URL: want, Last: "502"}) }, forge.LevelWarning, "502"},
		"the wrong place": {func(l *checkup.List) { l.Hook("x", want, checkup.Hook{URL: "https://a.example.org/?hunter2"}) }, forge.LevelFailure, "instead of"},
		"nowhere":         {func(l *checkup.List) { l.Hook("x", want, checkup.Hook{}) }, forge.LevelFailure, "nowhere"},
		"no URL":          {func(l *checkup.List) { l.WebhookURL("ci.example.org") }, forge.LevelFailure, "no http"},
		"not asked":       {func(l *checkup.List) { l.WebhookURL("") }, "", ""},
	} {
		var l checkup.List
		tc.add(&l)
		switch text := fmt.Sprint(l); {
		case tc.level == "" && len(l) != 0, tc.level != "" && (len(l) != 1 || l[0].Level != tc.level), !strings.Contains(text, tc.says), strings.Contains(text, "hunter2"):
			t.Errorf("%s: %+v, want %s with %q", name, l, tc.level, tc.says)
		case tc.level != "" && tc.level != forge.LevelNotice && l[0].Advice == "":
			t.Errorf("%s: no advice", name)
		}
	}
	var l checkup.List
	if l.Hooks("x", want, "", []checkup.Hook{{URL: want}, {URL: want}}); l[0].Level != forge.LevelWarning {
		t.Errorf("two: %+v", l)
	}
}
