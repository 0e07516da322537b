package amqpqueue

import (
	"context"
	"math"
	"slices"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/queue"
)

// lockRetry is how long to wait for others who look at the same dead letters.
const lockRetry = 20 * time.Millisecond

// walkSilence is how long to wait for the next of the dead letters that the
// broker says there are.
const walkSilence = 5 * time.Second

// errand is what has to be done before a letter goes; nil means that it stays.
type errand func(s *session) error

// DeadLetters implements queue.DeadLetterer. It looks at all letters, whatever
// limit says, and sorts them by their times, which are those of the clocks of who
// gave them up, and in whole seconds for what the broker itself gave up.
func (q *Queue) DeadLetters(ctx context.Context, topic, group string, limit int) ([]queue.DeadLetter, error) {
	var out []queue.DeadLetter
	if limit <= 0 {
		return nil, q.usable(ctx)
	}
	err := q.walk(ctx, topic, group, func(l queue.DeadLetter) errand {
		if out = append(out, l); len(out)-limit >= limit {
			out = oldest(out, limit)
		}
		return nil
	})
	if err != nil {
		return nil, err // the walk may still append
	}
	return oldest(out, limit), nil
}

func oldest(ls []queue.DeadLetter, limit int) []queue.DeadLetter {
	slices.SortStableFunc(ls, func(a, b queue.DeadLetter) int { return a.Time.Compare(b.Time) })
	if len(ls) > limit {
		clear(ls[limit:])
		ls = ls[:limit]
	}
	return ls
}

// Replay implements queue.DeadLetterer.
func (q *Queue) Replay(ctx context.Context, topic, group string, ids ...string) (int, error) {
	return q.pick(ctx, topic, group, ids, func(l queue.DeadLetter) errand {
		return func(s *session) error {
			return s.insist(ctx, &outgoing{
				exchange: q.o.Exchange, key: toGroup(topic, group), msg: encode(&l.Message, nil),
				declare: func(ctx context.Context) error {
					_, err := q.enter(ctx, s, topic, group)
					return err
				},
			})
		}
	})
}

// Drop implements queue.DeadLetterer.
func (q *Queue) Drop(ctx context.Context, topic, group string, ids ...string) (int, error) {
	return q.pick(ctx, topic, group, ids, func(queue.DeadLetter) errand {
		return func(*session) error { return nil }
	})
}

// pick removes the letters with the given message IDs once their errand is done.
func (q *Queue) pick(ctx context.Context, topic, group string, ids []string, do func(queue.DeadLetter) errand) (int, error) {
	if len(ids) == 0 {
		return 0, q.usable(ctx)
	}
	picked := make(map[string]bool, len(ids))
	for _, id := range ids {
		picked[id] = true
	}
	var n atomic.Int64 // the walk outlives ctx
	err := q.walk(ctx, topic, group, func(l queue.DeadLetter) errand {
		if !picked[l.Message.ID] {
			return nil
		}
		run := do(l)
		return func(s *session) error {
			if err := run(s); err != nil {
				return err
			}
			n.Add(1)
			return nil
		}
	})
	return int(n.Load()), err
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

// walk calls visit with each dead letter of a group, then does the errands that
// it returned, oldest letter first. AMQP can only take messages from a queue and
// put them back, so nobody else may walk at the time, who would not see what this
// one has in hand.
func (q *Queue) walk(ctx context.Context, topic, group string, visit func(queue.DeadLetter) errand) error {
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
	defer stop()
	ok := s.spawn(func() {
		unlock, err := s.lock(stopped, name)
		if err == nil {
			err = s.look(stopped, ch, name, func(d *amqp.Delivery) (time.Time, errand) {
				l := letter(d, topic, group)
				return l.Time, visit(l)
			})
			_ = ch.Close() // gives back what is in hand
			unlock()
		} else {
			_ = ch.Close()
		}
		done <- err
	})
	if !ok {
		return context.Cause(s.ctx)
	}
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

// look takes all messages of a queue with dead letters in hand, does what is to
// be done about them, oldest first, and puts back what stays. The broker gives
// those out again in any order, so their times are what tells which is older.
func (s *session) look(ctx context.Context, ch *amqp.Channel, name string, visit func(*amqp.Delivery) (time.Time, errand)) error {
	type held struct {
		tag  uint64
		died time.Time
		errand
	}
	var hand []held
	err := s.takeAll(ctx, ch, name, func(d *amqp.Delivery) {
		died, do := visit(d)
		if do != nil {
			hand = append(hand, held{d.DeliveryTag, died, do})
		}
	})
	slices.SortStableFunc(hand, func(a, b held) int { return a.died.Compare(b.died) })
	for _, h := range hand {
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = h.errand(s)
		}
		if err != nil {
			break
		}
		if aerr := ch.Ack(h.tag, false); aerr != nil {
			return s.lost(aerr)
		}
	}
	if nerr := ch.Nack(0, true, true); nerr != nil { // all that is left
		return s.lost(nerr)
	}
	return err
}

// takeAll calls take with each message that a queue has when it begins, not with
// those that come meanwhile, perhaps of being replayed.
func (s *session) takeAll(ctx context.Context, ch *amqp.Channel, name string, take func(*amqp.Delivery)) error {
	// The first one's answer counts the others, which a consumer then is sent faster.
	d, ok, err := ch.Get(name, false)
	if err != nil {
		return s.lost(err)
	}
	if !ok {
		return nil
	}
	take(&d)
	silence := time.NewTimer(walkSilence)
	defer silence.Stop()
	for rest := int(d.MessageCount); rest > 0; {
		n := min(rest, math.MaxUint16)
		if err := ch.Qos(n, 0, false); err != nil {
			return s.lost(err)
		}
		in, err := ch.Consume(name, "", false, false, false, false, nil)
		if err != nil {
			return s.lost(err)
		}
		for ; n > 0; n, rest = n-1, rest-1 {
			silence.Reset(walkSilence)
			select {
			case d, ok := <-in:
				if !ok {
					return s.lost(amqp.ErrClosed)
				}
				take(&d)
			case <-silence.C:
				return nil // somebody else has taken the rest
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	return nil
}
