// Package blobstoretest is the conformance suite of blobstore.Store. A driver
// runs it in one call:
//
//	func TestConformance(t *testing.T) {
//		blobstoretest.Run(t, blobstoretest.Harness{
//			Open: func(tb testing.TB) blobstore.Store { return mydriver.New(tb.TempDir()) },
//		})
//	}
//
// What is checked follows from what the store's Capabilities declare and from
// which of the harness's functions are there.
package blobstoretest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"testing"

	"github.com/solstice-ci/solstice-go/blobstore"
)

// Harness says how to get at the driver under test.
type Harness struct {
	// Open returns a new, empty store. The suite closes it.
	Open func(tb testing.TB) blobstore.Store
	// Reopen closes a store and returns another with the same content, as
	// after a restart. Nil where nothing survives.
	Reopen func(tb testing.TB, s blobstore.Store) blobstore.Store
	// Second returns another handle on an open store's content, as another
	// process would have. Nil where there is none.
	Second func(tb testing.TB, s blobstore.Store) blobstore.Store
	// Leftovers, optional, lists what a store occupies apart from its objects
	// (temporary files, unfinished uploads): none after a failed Put.
	Leftovers func(tb testing.TB, s blobstore.Store) []string
	// Abandon leaves behind what a Put does whose process dies halfway, one
	// thing. Needed where the store is a blobstore.Sweeper, as is Leftovers.
	Abandon func(tb testing.TB, s blobstore.Store)
	// Client follows the URLs of a blobstore.Presigner. Nil: one without proxy.
	Client *http.Client
}

// check is one promise of the interface.
type check struct {
	name string
	run  func(tb testing.TB, h Harness)
}

// Run runs the suite.
func Run(t *testing.T, h Harness) {
	for _, c := range checks {
		t.Run(c.name, func(t *testing.T) { c.run(t, h) })
	}
}

var checks = []check{
	{"RoundTrip", checkRoundTrip},
	{"Overwrite", checkOverwrite},
	{"IfAbsent", checkIfAbsent},
	{"IfAbsentRace", checkIfAbsentRace},
	{"PutRace", checkPutRace},
	{"Verify", checkVerify},
	{"FailedPut", checkFailedPut},
	{"Range", checkRange},
	{"RangeErrors", checkRangeErrors},
	{"ReaderIsolated", checkReaderIsolated},
	{"NotFound", checkNotFound},
	{"Delete", checkDelete},
	{"Invalid", checkInvalid},
	{"Keys", checkKeys},
	{"ListOrder", checkListOrder},
	{"ListPrefix", checkListPrefix},
	{"ListResume", checkListResume},
	{"ListBreak", checkListBreak},
	{"ListWhileDeleting", checkListWhileDeleting},
	{"DeletePutRace", checkDeletePutRace},
	{"Context", checkContext},
	{"ContextEndsReader", checkContextEndsReader},
	{"Closed", checkClosed},
	{"Reopen", checkReopen},
	{"SecondHandle", checkSecondHandle},
	{"Large", checkLarge},
	{"Presign", checkPresign},
	{"PresignExpires", checkPresignExpires},
	{"PresignErrors", checkPresignErrors},
	{"Sweep", checkSweep},
	{"SweepSparesPut", checkSweepSparesPut},
}

func open(tb testing.TB, h Harness) blobstore.Store {
	tb.Helper()
	s := h.Open(tb)
	tb.Cleanup(func() { s.Close() })
	return s
}

func put(tb testing.TB, s blobstore.Store, key, content string) blobstore.Info {
	tb.Helper()
	info, err := s.Put(tb.Context(), key, bytes.NewReader([]byte(content)), blobstore.PutOptions{})
	if err != nil {
		tb.Fatalf("Put(%q): %v", key, err)
	}
	return info
}

// get reads a whole object or, with an error, what came before it.
func get(ctx context.Context, s blobstore.Store, key string, o blobstore.GetOptions) (string, blobstore.Info, error) {
	r, info, err := s.Get(ctx, key, o)
	if err != nil {
		return "", info, err
	}
	data, err := io.ReadAll(r)
	return string(data), info, errors.Join(err, r.Close())
}

func want(tb testing.TB, s blobstore.Store, key, content string) {
	tb.Helper()
	got, info, err := get(tb.Context(), s, key, blobstore.GetOptions{})
	if err != nil {
		tb.Fatalf("Get(%q): %v", key, err)
	}
	if got != content {
		tb.Fatalf("Get(%q) gave %s, want %s", key, brief(got), brief(content))
	}
	if info.Key != key || info.Size != int64(len(content)) {
		tb.Fatalf("Get(%q) describes %q of %d bytes, want %d", key, info.Key, info.Size, len(content))
	}
}

func wantErr(tb testing.TB, what string, err, target error) {
	tb.Helper()
	if !errors.Is(err, target) {
		tb.Fatalf("%s: error %v, want one that wraps %v", what, err, target)
	}
}

func list(tb testing.TB, s blobstore.Store, o blobstore.ListOptions) []string {
	tb.Helper()
	keys := []string{}
	for info, err := range s.List(tb.Context(), o) {
		if err != nil {
			tb.Fatalf("List(%+v): %v", o, err)
		}
		keys = append(keys, info.Key)
	}
	return keys
}

// nothingLeft checks that only the given keys take up room.
func nothingLeft(tb testing.TB, h Harness, s blobstore.Store, keys ...string) {
	tb.Helper()
	if got := list(tb, s, blobstore.ListOptions{}); len(got) != len(keys) {
		tb.Fatalf("the store lists %q, want %q", got, keys)
	}
	if h.Leftovers != nil {
		if left := h.Leftovers(tb, s); len(left) > 0 {
			tb.Fatalf("left behind: %q", left)
		}
	}
}

func brief(s string) string {
	if len(s) > 40 {
		return s[:40] + "…"
	}
	return s
}
