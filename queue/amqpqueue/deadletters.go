package amqpqueue

import (
	"context"
	"errors"
	"slices"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/queue"
)

// lockRetry is how long to wait for others who look at the same dead letters.
const lockRetry = 20 * time.Millisecond

// errStop ends a walk.
var errStop = errors.New("amqpqueue: seen enough")

// verdict says what becomes of a dead letter.
type verdict bool

const (
	stays verdict = false
	goes  verdict = true
)

// DeadLetters implements queue.DeadLetterer.
func (q *Queue) DeadLetters(ctx context.Context, topic, group string, limit int) ([]queue.DeadLetter, error) {
	var out []queue.DeadLetter
	if limit <= 0 {
		return nil, q.usable(ctx)
	}
	err := q.walk(ctx, topic, group, func(_ *session, d *amqp.Delivery) (verdict, error) {
		out = append(out, letter(d, topic, group))
		if len(out) == limit {
			return stays, errStop
		}
		return stays, nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// Replay implements queue.DeadLetterer.
func (q *Queue) Replay(ctx context.Context, topic, group string, ids ...string) (int, error) {
	return q.pick(ctx, topic, group, ids, func(s *session, d *amqp.Delivery) error {
		m := decode(d)
		return s.pub.insist(ctx, &outgoing{
			exchange: q.o.Exchange, key: toGroup(topic, group), msg: encode(&m, nil),
			declare: func(ctx context.Context) error {
				_, err := q.enter(ctx, s, topic, group)
				return err
			},
		})
	})
}

// Drop implements queue.DeadLetterer.
func (q *Queue) Drop(ctx context.Context, topic, group string, ids ...string) (int, error) {
	return q.pick(ctx, topic, group, ids, func(*session, *amqp.Delivery) error { return nil })
}

// pick removes the letters with the given message IDs once do succeeded.
func (q *Queue) pick(ctx context.Context, topic, group string, ids []string, do func(*session, *amqp.Delivery) error) (n int, err error) {
	if len(ids) == 0 {
		return 0, q.usable(ctx)
	}
	err = q.walk(ctx, topic, group, func(s *session, d *amqp.Delivery) (verdict, error) {
		if !slices.Contains(ids, d.MessageId) {
			return stays, nil
		}
		if err := do(s, d); err != nil {
			return stays, err
		}
		n++
		return goes, nil
	})
	return n, err
}

func (q *Queue) usable(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if q.ctx.Err() != nil {
		return errClosed
	}
	return nil
}

// walk calls visit with the dead letters of a group, oldest first. AMQP can only
// take messages from a queue and put them back, so nobody else may walk at the
// time: others would not see what this one has in hand, and it would go back in
// another order.
func (q *Queue) walk(ctx context.Context, topic, group string, visit func(*session, *amqp.Delivery) (verdict, error)) error {
	if err := q.usable(ctx); err != nil {
		return err
	}
	if queue.ValidateName("topic", topic) != nil || queue.ValidateName("group", group) != nil {
		return nil // which therefore has none
	}
	s, err := q.session(ctx)
	if err != nil {
		return err
	}
	name, err := q.deadQueueOf(ctx, s, topic, group)
	if err != nil || name == "" {
		return err
	}
	ch, err := s.channel(ctx)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	stopped, stop := context.WithCancel(ctx)
	s.work.Go(func() {
		unlock, err := s.lock(stopped, name)
		if err == nil {
			err = s.look(stopped, ch, name, visit)
			_ = ch.Close() // gives back what is in hand
			unlock()
		} else {
			_ = ch.Close()
		}
		done <- err
	})
	defer stop()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-q.ctx.Done():
		return errClosed
	}
}

// deadQueueOf returns the queue with a group's dead letters, empty for none.
func (q *Queue) deadQueueOf(ctx context.Context, s *session, topic, group string) (string, error) {
	if ok, err := q.claimed(ctx, s, topic); !ok {
		return "", err
	}
	name, err := q.claim(ctx, s, topic, group)
	if err != nil {
		return "", err
	}
	name = deadQueue(name)
	err = s.do(ctx, func(ch *amqp.Channel) error {
		_, err := ch.QueueDeclarePassive(name, true, false, false, false, nil)
		return err
	})
	if hasCode(err, amqp.NotFound) {
		return "", nil
	}
	return name, classify(err)
}

// lock makes the caller the only one to walk through a queue, in this process
// and among all: an exclusive queue is its connection's alone.
func (s *session) lock(ctx context.Context, name string) (unlock func(), err error) {
	select {
	case s.letters <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-s.ctx.Done():
		return nil, context.Cause(s.ctx)
	}
	name += ".lock"
	for {
		ch, err := s.conn.Channel() // which ends when the lock is refused
		if err != nil {
			<-s.letters
			return nil, s.lost(err)
		}
		_, err = ch.QueueDeclare(name, false, true, true, false, nil)
		if err == nil {
			return func() {
				_, _ = ch.QueueDelete(name, false, false, false) // or it goes with the connection
				_ = ch.Close()
				<-s.letters
			}, nil
		}
		_ = ch.Close()
		if hasCode(err, amqp.ResourceLocked) {
			select {
			case <-time.After(lockRetry):
				continue
			case <-ctx.Done():
				err = ctx.Err()
			}
		}
		<-s.letters
		return nil, classify(err)
	}
}

// look visits the messages of a queue with dead letters.
func (s *session) look(ctx context.Context, ch *amqp.Channel, name string, visit func(*session, *amqp.Delivery) (verdict, error)) (err error) {
	var kept []uint64
	for err == nil {
		if err = ctx.Err(); err != nil {
			break
		}
		d, ok, gerr := ch.Get(name, false)
		if gerr != nil {
			return s.lost(gerr)
		}
		if !ok {
			break
		}
		var v verdict
		if v, err = visit(s, &d); v == stays {
			kept = append(kept, d.DeliveryTag)
		} else if aerr := ch.Ack(d.DeliveryTag, false); aerr != nil {
			return s.lost(aerr)
		}
	}
	// One by one, which keeps their order.
	for _, tag := range kept {
		if nerr := ch.Nack(tag, false, true); nerr != nil {
			return s.lost(nerr)
		}
	}
	if errors.Is(err, errStop) {
		err = nil
	}
	return err
}
