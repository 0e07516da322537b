package amqpqueue

import (
	"strings"
	"time"
	"unicode/utf8"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/queue"
)

// Headers beside the attributes. Names that begin with x- are the broker's and
// ours.
const (
	headerAttempt    = "x-solstice-attempt"    // deliveries before this copy was published
	headerNotBefore  = "x-solstice-not-before" // Unix time in µs
	headerAttributes = "x-solstice-attributes" // attributes whose names mean something to the broker
	headerReason     = "x-solstice-reason"     // these three: of dead letters
	headerDied       = "x-solstice-died"       // Unix time in µs
	headerDeliveries = "x-delivery-count"      // the broker's: redeliveries of this copy

	// maxReason bounds the reason of a dead letter, since all headers have to
	// fit one frame.
	maxReason = 4 << 10
)

// reserved says that the broker would act on a header of this name, or that we
// would.
func reserved(name string) bool {
	return strings.HasPrefix(name, "x-") || name == "CC" || name == "BCC"
}

// encode makes a persistent publishing. extra are headers of ours, which the
// result takes over; nil for none.
func encode(m *queue.Message, extra amqp.Table) amqp.Publishing {
	headers := extra
	if len(m.Attributes) > 0 {
		if headers == nil {
			headers = make(amqp.Table, len(m.Attributes))
		}
		for k, v := range m.Attributes {
			if !reserved(k) {
				headers[k] = v
				continue
			}
			t, _ := headers[headerAttributes].(amqp.Table)
			if t == nil {
				t = amqp.Table{}
				headers[headerAttributes] = t
			}
			t[k] = v
		}
	}
	return amqp.Publishing{
		Headers: headers, ContentType: m.ContentType, MessageId: m.ID, DeliveryMode: amqp.Persistent, Body: m.Body,
	}
}

// decode is the reverse, for messages of others too.
func decode(d *amqp.Delivery) queue.Message {
	m := queue.Message{ID: d.MessageId, Body: d.Body, ContentType: d.ContentType}
	add := func(k, v string) {
		if m.Attributes == nil {
			m.Attributes = make(map[string]string, len(d.Headers))
		}
		m.Attributes[k] = v
	}
	for k, v := range d.Headers {
		switch v := v.(type) {
		case string:
			if !reserved(k) {
				add(k, v)
			}
		case amqp.Table:
			if k != headerAttributes {
				continue
			}
			for k, v := range v {
				if s, ok := v.(string); ok {
					add(k, s)
				}
			}
		}
	}
	m.NotBefore = micros(d.Headers, headerNotBefore)
	return m
}

func number(t amqp.Table, key string) int64 {
	switch n := t[key].(type) {
	case int64:
		return n
	case int32:
		return int64(n)
	case int16:
		return int64(n)
	case int8:
		return int64(n)
	case uint8:
		return int64(n)
	case uint16:
		return int64(n)
	case uint32:
		return int64(n)
	case int:
		return int64(n)
	}
	return 0
}

func micros(t amqp.Table, key string) time.Time {
	if n := number(t, key); n != 0 {
		return time.UnixMicro(n)
	}
	return time.Time{}
}

// count is a number that others may have made up.
func count(t amqp.Table, key string) int {
	return int(min(max(number(t, key), 0), noLimit))
}

// attempt counts the deliveries of a message to its group, this one included.
func attempt(d *amqp.Delivery) int {
	return count(d.Headers, headerAttempt) + count(d.Headers, headerDeliveries) + 1
}

// letterHeaders are those of a dead letter.
func letterHeaders(reason string, attempt int) amqp.Table {
	return amqp.Table{
		headerReason: shorten(reason), headerAttempt: int64(attempt), headerDied: time.Now().UnixMicro(),
	}
}

func shorten(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= maxReason {
		return s
	}
	s = s[:maxReason]
	for !utf8.ValidString(s) {
		s = s[:len(s)-1]
	}
	return s
}

// letter reads a dead letter of ours, or one that the broker made.
func letter(d *amqp.Delivery, topic, group string) queue.DeadLetter {
	l := queue.DeadLetter{Message: decode(d), Topic: topic, Group: group, Time: micros(d.Headers, headerDied)}
	l.Message.NotBefore = time.Time{}
	if _, ours := d.Headers[headerDied]; ours {
		l.Attempt = count(d.Headers, headerAttempt)
		l.Reason, _ = d.Headers[headerReason].(string)
		return l
	}
	l.Reason = "dead-lettered by the broker"
	if deaths, _ := d.Headers["x-death"].([]any); len(deaths) > 0 {
		if death, ok := deaths[0].(amqp.Table); ok {
			reason, _ := death["reason"].(string)
			if l.Reason += ": " + reason; reason == "delivery_limit" {
				l.Attempt = count(d.Headers, headerAttempt) + deliveryLimit + 1
			}
			if at, ok := death["time"].(time.Time); ok {
				l.Time = at
			}
		}
	}
	return l
}
