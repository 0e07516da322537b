package amqpqueue_test

import (
	"errors"
	"net/http"
	"net/url"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/amqpqueue"
)

// TestPublishIsNotPermitted: a user who may declare and not write is told so by
// each Publish; who reads meanwhile is not disturbed.
func TestPublishIsNotPermitted(t *testing.T) {
	broker := testenv.SharedRabbitMQ(t)
	u, err := url.Parse(broker.VHost(t))
	if err != nil {
		t.Fatal(err)
	}
	vhost := u.Path[1:]
	allowed := withURL(t, amqpqueue.Options{URL: u.String()})
	broker.Manage(t, http.MethodPut, "/users/"+vhost, map[string]string{"password": "x", "tags": ""}, nil)
	t.Cleanup(func() { broker.Manage(t, http.MethodDelete, "/users/"+vhost, nil, nil) })
	broker.Manage(t, http.MethodPut, "/permissions/"+vhost+"/"+vhost, map[string]string{"configure": ".*", "write": `^(?!solstice\.jobs$)`, "read": ".*"}, nil)
	u.User = url.UserPassword(vhost, "x")
	q := withURL(t, amqpqueue.Options{URL: u.String()})
	sub, err := q.Subscribe(t.Context(), "t", queue.SubscribeOptions{Group: "g"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Close() }()
	if err := allowed.Publish(t.Context(), "t", message("m"), queue.PublishOptions{}); err != nil {
		t.Fatal(err)
	}
	d, err := sub.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := q.Publish(t.Context(), "t", message("m"), queue.PublishOptions{}); !errors.Is(err, amqpqueue.ErrPermission) {
			t.Fatalf("%v, want %v", err, amqpqueue.ErrPermission)
		}
	}
	if err := d.Ack(t.Context()); err != nil { // on the channel that it came through
		t.Errorf("ack: %v", err)
	}
}
