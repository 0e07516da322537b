package daemon

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Age is a flag for a length of time that is mostly days: "30d", "1d12h", what
// [time.ParseDuration] takes, or "forever", which is [Forever].
type Age time.Duration

// Forever has no end.
const Forever Age = -1

const day = 24 * time.Hour

// UnmarshalText implements encoding.TextUnmarshaler.
func (a *Age) UnmarshalText(text []byte) error {
	s := string(text)
	if s == "forever" {
		*a = Forever
		return nil
	}
	total := time.Duration(0)
	if days, rest, ok := strings.Cut(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil {
			return ageError(s)
		}
		total, s = time.Duration(n)*day, rest
	}
	if s != "" || total == 0 {
		d, err := time.ParseDuration(s)
		if err != nil || d < 0 || d > d+total {
			return ageError(string(text))
		}
		total += d
	}
	if total <= 0 {
		return errors.New("it has to be longer than nothing; to keep everything say forever")
	}
	*a = Age(total)
	return nil
}

func ageError(s string) error {
	return fmt.Errorf("%q is no length of time such as 30d, 36h, 1d12h or forever", s)
}

// String is the form that UnmarshalText reads.
func (a Age) String() string {
	d := time.Duration(a)
	if d < 0 {
		return "forever"
	}
	if rest := d % day; d >= day && rest == 0 {
		return strconv.FormatInt(int64(d/day), 10) + "d"
	} else if d >= day {
		return strconv.FormatInt(int64(d/day), 10) + "d" + rest.String()
	}
	return d.String()
}
