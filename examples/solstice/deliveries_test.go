package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
	"github.com/solstice-ci/solstice-go/solstice/integration"
)

// open takes webhooks that are events in JSON, of everybody.
type openForge struct{ forge.Forge }

func (openForge) Capabilities() forge.Capabilities { return forge.Capabilities{Webhooks: true} }

func (openForge) ParseWebhook(_ context.Context, r *http.Request, _ forge.SecretFunc) (ev forge.Event, err error) {
	return ev, json.NewDecoder(r.Body).Decode(&ev)
}

// TestDeliveries: webhooks are listed, shown and replayed.
func TestDeliveries(t *testing.T) {
	state := t.TempDir()
	u := newUser(t, t.TempDir())
	u.env = []string{"STATE_DIR=" + state}
	u.solstice("deliveries", "list").want(t, exitCouldNotRun) // nothing has run there

	db, err := storage.Database{DBPoolMaxSize: 4, DBPoolTimeoutMS: 5000}.Open(t.Context(), state, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := solstice.Migrate(t.Context(), db); err != nil {
		t.Fatal(err)
	}
	in, err := integration.New(t.Context(), integration.Config{DB: db, Queue: memqueue.New(), Forges: map[string]integration.Instance{
		"f": {Forge: openForge{}, AllowAll: true, Secret: func(context.Context, string) ([]byte, error) { return nil, nil }},
	}})
	if err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(in)
	defer web.Close()
	post := func(body string) {
		t.Helper()
		resp, err := http.Post(web.URL+"/webhooks/f", "application/json", bytes.NewReader([]byte(body)))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if text, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusAccepted {
			t.Fatalf("%d %s", resp.StatusCode, text)
		}
	}
	push := `{"kind": "push", "repo": {"owner": "acme", "name": "widget"}, "ref": "refs/heads/main", "title": "Less noise"}`
	post(push)
	post(`{"kind": "ping"}`)

	var list struct{ Deliveries []integration.Delivery }
	if err := json.Unmarshal([]byte(u.ok("deliveries", "list", "--json")), &list); err != nil || len(list.Deliveries) != 2 {
		t.Fatalf("%+v, %v", list, err)
	}
	ping, pushed := list.Deliveries[0], list.Deliveries[1]
	has(t, "table", u.ok("deliveries", "list"), "acme/widget", "accepted", "nothing to do for ping")
	has(t, "one", u.ok("deliveries", "show", pushed.ID), "Less noise", "refs/heads/main", "Content-Type")
	if got := u.ok("deliveries", "show", "--body", pushed.ID); got != push {
		t.Errorf("body %q", got)
	}
	has(t, "stdout", u.ok("deliveries", "replay", pushed.ID), "replayed as ")
	if err := json.Unmarshal([]byte(u.ok("deliveries", "list", "--json", "--limit", "1")), &list); err != nil || list.Deliveries[0].ReplayOf != pushed.ID {
		t.Errorf("%+v, %v", list, err)
	}
	r := u.solstice("deliveries", "replay", ping.ID)
	r.want(t, exitFailed)
	has(t, "stderr", r.stderr, "nothing to replay")
	r = u.solstice("deliveries", "show", "none")
	r.want(t, exitFailed)
	has(t, "stderr", r.stderr, "no such webhook")
}
