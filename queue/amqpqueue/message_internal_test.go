package amqpqueue

import (
	"bytes"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/queue"
)

// delivered is what the broker makes of a publishing.
func delivered(p amqp.Publishing) *amqp.Delivery {
	return &amqp.Delivery{Headers: p.Headers, ContentType: p.ContentType, MessageId: p.MessageId, Body: p.Body}
}

func TestMessagesKeepWhatTheyHold(t *testing.T) {
	for _, m := range []queue.Message{
		{},
		{ID: "id", Body: []byte{0, 0xff}, ContentType: "a/b"},
		{ID: "id", Attributes: map[string]string{"traceparent": "00-1-2-01", "": "", "é": "ü"}},
		{Attributes: map[string]string{ // names that the broker or we would act on
			"CC": "a", "BCC": "b", "x-delay": "c", "x-delivery-count": "7", "x-death": "d", headerAttempt: "5",
			headerNotBefore: "6", headerAttributes: "e", headerDied: "f", "X-mine": "g", "cc": "h",
		}},
	} {
		p := encode(&m, nil)
		if err := p.Headers.Validate(); err != nil {
			t.Errorf("%v: %v", m, err)
		}
		if p.DeliveryMode != amqp.Persistent {
			t.Errorf("%v is not persistent", m)
		}
		d := delivered(p)
		if got := decode(d); !reflect.DeepEqual(got, m) {
			t.Errorf("%v became %v", m, got)
		}
		if n := attempt(d); n != 1 {
			t.Errorf("%v: attempt %d", m, n)
		}
		l := letter(delivered(encode(&m, letterHeaders("why", 3))), "t", "g")
		if want := (queue.DeadLetter{Message: m, Topic: "t", Group: "g", Reason: "why", Attempt: 3, Time: l.Time}); !reflect.DeepEqual(l, want) || l.Time.IsZero() {
			t.Errorf("%v died as %v", want, l)
		}
	}
	at := time.UnixMicro(time.Now().UnixMicro())
	d := delivered(encode(&queue.Message{Attributes: map[string]string{"x-a": "b"}}, amqp.Table{
		headerAttempt: int64(4), headerNotBefore: at.UnixMicro(), headerDeliveries: int64(2),
	}))
	if got := decode(d); !got.NotBefore.Equal(at) || got.Attributes["x-a"] != "b" || len(got.Attributes) != 1 {
		t.Errorf("a delayed one became %v", got)
	}
	if n := attempt(d); n != 7 { // 4 of earlier copies, 3 of this one
		t.Errorf("attempt %d, want 7", n)
	}
}

// TestForeignHeaders: what does not fit is left out, and counts as nothing.
func TestForeignHeaders(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	odd := amqp.Table{
		"number": int32(1), "bytes": []byte("b"), "list": []any{"a"}, "nothing": nil, "time": now, "text": "kept",
		headerAttempt: "many", headerNotBefore: now, headerAttributes: "no table", headerDeliveries: 1.5,
	}
	d := &amqp.Delivery{Headers: odd}
	if got, want := decode(d), (queue.Message{Attributes: map[string]string{"text": "kept"}}); !reflect.DeepEqual(got, want) {
		t.Errorf("decoded %v, want %v", got, want)
	}
	if n := attempt(d); n != 1 {
		t.Errorf("attempt %d", n)
	}
	odd[headerAttributes] = amqp.Table{"x-a": "b", "x-n": int64(1), "CC": []any{}}
	if got := decode(d).Attributes; !reflect.DeepEqual(got, map[string]string{"text": "kept", "x-a": "b"}) {
		t.Errorf("attributes %v", got)
	}
	for _, n := range []int64{-5, math.MinInt64, math.MaxInt64} {
		if got := attempt(&amqp.Delivery{Headers: amqp.Table{headerAttempt: n, headerDeliveries: n}}); got < 1 {
			t.Errorf("attempt %d of %d", got, n)
		}
	}
	for _, n := range []any{int8(7), int16(7), int32(7), int64(7), 7, uint8(7), uint16(7), uint32(7)} {
		if got := attempt(&amqp.Delivery{Headers: amqp.Table{headerDeliveries: n}}); got != 8 {
			t.Errorf("attempt %d of %T", got, n)
		}
	}
}

func TestLettersOfTheBroker(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	death := func(reason any) amqp.Table {
		return amqp.Table{headerAttempt: int64(2), "x-death": []any{amqp.Table{"reason": reason, "time": now, "queue": "q"}}}
	}
	for _, c := range []struct {
		name    string
		headers amqp.Table
		reason  string
		attempt int
		at      time.Time
	}{
		{"delivery limit", death("delivery_limit"), "delivery_limit", 2 + deliveryLimit + 1, now},
		{"expired", death("expired"), "expired", 0, now},
		{"reason of another type", death(int32(1)), "by the broker", 0, now},
		{"no table", amqp.Table{"x-death": []any{"x"}}, "by the broker", 0, time.Time{}},
		{"none", amqp.Table{"x-death": []any{}}, "by the broker", 0, time.Time{}},
		{"no list", amqp.Table{"x-death": "x"}, "by the broker", 0, time.Time{}},
		{"nothing at all", nil, "by the broker", 0, time.Time{}},
		{"ours, with odd types", amqp.Table{headerDied: "x", headerReason: int32(1), headerAttempt: "x"}, "", 0, time.Time{}},
	} {
		l := letter(&amqp.Delivery{Headers: c.headers}, "t", "g")
		if !strings.Contains(l.Reason, c.reason) || l.Attempt != c.attempt || !l.Time.Equal(c.at) {
			t.Errorf("%s: %+v", c.name, l)
		}
	}
}

func TestReasonsAreShort(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "short": "short", "not \xff text": "not \uFFFD text",
		strings.Repeat("a", maxReason+1):       strings.Repeat("a", maxReason),
		strings.Repeat("a", maxReason-1) + "é": strings.Repeat("a", maxReason-1),
	} {
		if got := shorten(in); got != want {
			t.Errorf("%.20q… of %d bytes became %d bytes", in, len(in), len(got))
		}
	}
}

// TestTiers: a delay passes through the longest tier that is not longer.
func TestTiers(t *testing.T) {
	q := &Queue{o: Options{Prefix: "p"}}
	for d, want := range map[time.Duration]string{
		-time.Hour: "p.delay.100", 0: "p.delay.100", time.Millisecond: "p.delay.100", 199 * time.Millisecond: "p.delay.100",
		200 * time.Millisecond: "p.delay.200", 399 * time.Millisecond: "p.delay.200", time.Second: "p.delay.800",
		time.Minute: "p.delay.51200", time.Hour: "p.delay.3276800", 24 * time.Hour: "p.delay.3276800", math.MaxInt64: "p.delay.3276800",
	} {
		s := &session{known: map[string]struct{}{want: {}}} // which any other would have to declare
		o, err := q.delayed(t.Context(), s, d, "key", amqp.Publishing{})
		if err != nil || o.exchange != want || o.key != "key" {
			t.Errorf("%v goes through %s to %s, %v: want %s", d, o.exchange, o.key, err, want)
		}
	}
}

// FuzzDelivery: whatever somebody publishes to our queues can be delivered, moved
// elsewhere and kept as a dead letter, and stays what it is.
func FuzzDelivery(f *testing.F) {
	f.Add("id", "a/b", []byte("body"), "key", "value", int64(0), int64(0), int64(0), byte(0))
	f.Add("", "", []byte(nil), headerAttributes, "v", int64(-1), int64(math.MaxInt64), int64(math.MinInt64), byte(1))
	f.Add("\xff", "\x00", []byte{0}, "CC", "\xff", int64(math.MaxInt64), int64(math.MaxInt64), int64(1), byte(2))
	f.Add("id", "", []byte("x"), "x-death", "expired", int64(1), int64(2), int64(1<<52), byte(3))
	f.Add("id", "", []byte("x"), headerDied, "delivery_limit", int64(1), int64(2), int64(3), byte(4))
	f.Add("id", "", []byte("x"), headerReason, strings.Repeat("é", maxReason), int64(1), int64(2), int64(3), byte(5))
	f.Fuzz(func(t *testing.T, id, contentType string, body []byte, key, value string, n, deliveries, at int64, kind byte) {
		headers := amqp.Table{headerAttempt: n, headerDeliveries: deliveries, headerNotBefore: at}
		switch kind % 6 {
		case 0:
			headers[key] = value
		case 1:
			headers[key] = []byte(value)
		case 2:
			headers[key] = amqp.Table{key: value, value: n}
		case 3:
			headers[key] = []any{amqp.Table{"reason": value, "time": time.Unix(at, 0)}}
		case 4:
			headers[key] = n
		case 5:
			headers[key] = value
			headers[headerDied] = at
		}
		d := &amqp.Delivery{Headers: headers, MessageId: id, ContentType: contentType, Body: body}
		m := decode(d)
		if m.ID != id || m.ContentType != contentType || !bytes.Equal(m.Body, body) {
			t.Errorf("%v became %v", d, m)
		}
		if got := attempt(d); got < 1 {
			t.Errorf("attempt %d of %d and %d", got, n, deliveries)
		}
		p := encode(&m, letterHeaders(value, attempt(d)))
		if err := p.Headers.Validate(); err != nil {
			t.Errorf("%v cannot be published again: %v", m, err)
		}
		again := letter(delivered(p), "t", "g")
		m.NotBefore = time.Time{}
		if !reflect.DeepEqual(again.Message, m) || again.Attempt != min(attempt(d), noLimit) {
			t.Errorf("%v became the dead letter %v", m, again)
		}
		if !utf8.ValidString(again.Reason) || len(again.Reason) > maxReason {
			t.Errorf("reason %q", again.Reason)
		}
		letter(d, "t", "g")
	})
}
