package daemon

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestAge(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"30d": 30 * day, "1d12h": 36 * time.Hour, "36h": 36 * time.Hour, "90m": 90 * time.Minute, "2d30m": 2*day + 30*time.Minute, "forever": -1, "0d1h": time.Hour,
	} {
		var a, again Age
		if err := a.UnmarshalText([]byte(in)); err != nil || time.Duration(a) != want {
			t.Errorf("%s is %s, %v", in, time.Duration(a), err)
		}
		if err := again.UnmarshalText([]byte(a.String())); err != nil || again != a {
			t.Errorf("%s is written as %s, which is %s, %v", in, a, again, err)
		}
	}
	for _, in := range []string{"", "d", "0", "0d", "-1d", "-2h", "1d-2h", "30", "3x", "1.5d", "99999d", "d5h", "1d1d", "Forever", "65535d2000000h1000000h"} {
		var a Age
		if err := a.UnmarshalText([]byte(in)); err == nil {
			t.Errorf("%q is taken as %s", in, a)
		}
	}
}

func TestAgeAsFlag(t *testing.T) {
	var f struct {
		Keep Age `env:"KEEP" default:"90d"`
	}
	for _, c := range []struct {
		args, env []string
		want      time.Duration
		problem   string
	}{
		{want: 90 * day},
		{args: []string{"--keep=7d"}, env: []string{"KEEP=8d"}, want: 7 * day},
		{env: []string{"KEEP=forever"}, want: -1},
		{env: []string{"KEEP=8 days"}, problem: "KEEP"},
		{args: []string{"--keep=soon"}, problem: "30d"},
	} {
		_, err := Parse(&f, Program{Name: "p", Args: append([]string{}, c.args...), Environ: append([]string{}, c.env...)})
		switch exit, ok := errors.AsType[*ExitError](err); {
		case c.problem == "" && (err != nil || time.Duration(f.Keep) != c.want):
			t.Errorf("%q %q: %s, %v", c.args, c.env, f.Keep, err)
		case c.problem != "" && (!ok || exit.Code != ExitUsage || !strings.Contains(err.Error(), c.problem)):
			t.Errorf("%q %q: %v", c.args, c.env, err)
		}
	}
}
