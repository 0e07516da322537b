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
// each Publish.
func TestPublishIsNotPermitted(t *testing.T) {
	broker := testenv.SharedRabbitMQ(t)
	u, err := url.Parse(broker.VHost(t))
	if err != nil {
		t.Fatal(err)
	}
	vhost := u.Path[1:]
	withURL(t, amqpqueue.Options{URL: u.String()}) // declares the exchanges
	broker.Manage(t, http.MethodPut, "/users/"+vhost, map[string]string{"password": "x", "tags": ""}, nil)
	t.Cleanup(func() { broker.Manage(t, http.MethodDelete, "/users/"+vhost, nil, nil) })
	broker.Manage(t, http.MethodPut, "/permissions/"+vhost+"/"+vhost, map[string]string{"configure": ".*", "write": "^none$", "read": ".*"}, nil)
	u.User = url.UserPassword(vhost, "x")
	q := withURL(t, amqpqueue.Options{URL: u.String()})
	for range 20 {
		if err := q.Publish(t.Context(), "t", message("m"), queue.PublishOptions{}); !errors.Is(err, amqpqueue.ErrPermission) {
			t.Fatalf("%v, want %v", err, amqpqueue.ErrPermission)
		}
	}
}
