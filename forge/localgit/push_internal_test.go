package localgit

import (
	"errors"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
)

// What git's lines may be, whole or cut, gives branches and tags that are there, or
// one typed error.
func FuzzPostReceive(f *testing.F) {
	const zeros, a, b = "0000000000000000000000000000000000000000", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	for _, seed := range []string{
		"", zeros + " " + a + " refs/heads/main\n", a + " " + b + " refs/tags/v1", a + " " + zeros + " refs/heads/gone\n",
		a + " " + b + " refs/notes/commits\n", a + " " + b + " \n", "\n", a + "  refs/heads/main\n", a + " " + b + " refs/heads/\xff \x1b[2J\r\n",
		strings.Repeat(zeros+" "+a+" refs/heads/x\n", 5), strings.Repeat("a", 64) + " " + strings.Repeat("b", 64) + " refs/heads/main\n",
		a + " " + b + " refs/heads/" + strings.Repeat("x", maxUpdate),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in string) {
		const limit = 3
		pushed, more, err := parseUpdates(strings.NewReader(in), limit)
		if err != nil && (!errors.Is(err, forge.ErrInvalid) || pushed != nil) {
			t.Fatalf("%v with %v", err, pushed)
		}
		if len(pushed) > limit || more > 0 && len(pushed) < limit {
			t.Fatalf("%d and %d more", len(pushed), more)
		}
		for _, u := range pushed {
			if !forge.IsCommit(u.after) || strings.Trim(u.after, "0") == "" || !strings.HasPrefix(u.ref, "refs/") || strings.Contains(u.ref, "\n") {
				t.Fatalf("%+v", u)
			}
		}
	})
}

func FuzzDescribe(f *testing.F) {
	f.Add([]byte("tree x\nauthor A U Thor <a@b> 1 +0000\ncommitter C <c@d> 1 +0000\n\n\ntitle\n\nbody\n"))
	f.Add([]byte("author \xff <\n\n" + strings.Repeat("ä", maxMessage)))
	f.Add([]byte("author <>"))
	f.Fuzz(func(t *testing.T, commit []byte) {
		e := forge.Event{Kind: forge.KindPush, Repo: forge.Repo{Name: "r"}, Ref: "refs/heads/main", Commit: strings.Repeat("a", 40)}
		describe(&e, commit)
		if err := e.Validate(); err != nil || len(e.Title) > maxTitle || len(e.Message) > maxMessage || len(e.Sender.Login) > maxSender || strings.Contains(e.Title, "\n") {
			t.Fatalf("%+v, %v", e, err)
		}
	})
}
