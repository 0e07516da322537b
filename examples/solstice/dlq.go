package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
)

type dlqCmd struct {
	List   dlqListCmd   `cmd:"" help:"List the messages of a topic that could not be handled, oldest first."`
	Replay dlqReplayCmd `cmd:"" help:"Have messages handled again."`
	Drop   dlqDropCmd   `cmd:"" help:"Delete messages that could not be handled."`
}

// letters are the flags of commands that work on the queue itself, which may be
// in use.
type letters struct {
	daemon.State
	storage.Database
	storage.Broker

	Topic string `arg:"" help:"Topic, such as runrequest or status.FORGE."`
	Group string `default:"solstice" placeholder:"NAME" help:"Group of readers that gave the messages up (${default})."`
}

// open connects to the queue, in RabbitMQ or in the database.
func (l *letters) open(ctx context.Context, do func(queue.DeadLetterer) error) (err error) {
	defer func() { err = couldNot(err) }()
	if err := errors.Join(queue.ValidateName("topic", l.Topic), queue.ValidateName("group", l.Group)); err != nil {
		return unable("there is no such topic or group", err, "")
	}
	log := slog.New(slog.DiscardHandler)
	var db *bun.DB
	if l.AMQPURL == "" && l.AMQPURLFile == "" {
		dir := ""
		if l.DatabaseURL == "" && l.DatabaseURLFile == "" {
			if dir, err = l.state(); err != nil {
				return err
			}
		}
		if db, err = l.Database.Open(ctx, dir, log); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, db.Close()) }()
	}
	q, err := l.Broker.Open(ctx, db, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	d, ok := queue.As[queue.DeadLetterer](q)
	if !ok {
		return unable("this queue keeps no dead letters", errors.ErrUnsupported, "")
	}
	if err := do(d); err != nil {
		return problem("cannot work on the dead letters of "+l.Topic, err, "")
	}
	return nil
}

// state is the state directory of an orchestrator, which has run.
func (l *letters) state() (string, error) {
	if l.StateDir != "" {
		if _, err := os.Stat(filepath.Join(l.StateDir, "solstice.db")); errors.Is(err, fs.ErrNotExist) {
			return "", unable("there is no queue in "+l.StateDir, nil, "give --state-dir of the orchestrator, --database-url or --amqp-url")
		}
	}
	return l.State.Open()
}

// allLetters is how many at most are listed where all are meant.
const allLetters = 1_000_000

type dlqListCmd struct {
	letters
	output
	Limit int  `short:"n" default:"50" placeholder:"N" help:"At most this many (${default})."`
	Body  bool `help:"With --json: the messages' bodies as well, which may hold what is nobody's business."`
}

// letterJSON is a dead letter in JSON.
type letterJSON struct {
	ID          string            `json:"id"`
	Topic       string            `json:"topic"`
	Group       string            `json:"group"`
	Time        time.Time         `json:"time,omitzero"`
	Attempts    int               `json:"attempts"`
	Reason      string            `json:"reason"`
	ContentType string            `json:"content_type,omitempty"`
	Attributes  map[string]string `json:"attributes,omitempty"`
	Size        int               `json:"size"` // bytes of the body
	Body        any               `json:"body,omitempty"`
}

// Run is kong's.
func (c *dlqListCmd) Run(e *env) error {
	if c.Limit < 1 {
		return unable("--limit is not positive", nil, "")
	}
	return c.open(e.ctx, func(d queue.DeadLetterer) error {
		found, err := d.DeadLetters(e.ctx, c.Topic, c.Group, c.Limit)
		if err != nil {
			return err
		}
		if c.JSON {
			out := make([]letterJSON, 0, len(found))
			for _, l := range found {
				out = append(out, c.json(l))
			}
			return document(struct {
				Letters []letterJSON `json:"dead_letters"`
			}{out})
		}
		out, t := c.screen(), table{}
		out.header(&t, "ID", "TIME", "ATTEMPTS", "SCHEMA", "SIZE", "REASON")
		for _, l := range found {
			when := ""
			if !l.Time.IsZero() {
				when = l.Time.Format(time.RFC3339)
			}
			t.row(plain(l.Message.ID), when, fmt.Sprint(l.Attempt), plain(l.Message.Attributes[messages.AttributeSchema]), fmt.Sprint(len(l.Message.Body)), plain(l.Reason))
		}
		t.print(out, "")
		if len(found) == c.Limit {
			note("there may be more: give a larger --limit")
		}
		return nil
	})
}

func (c *dlqListCmd) json(l queue.DeadLetter) letterJSON {
	j := letterJSON{
		ID: l.Message.ID, Topic: l.Topic, Group: l.Group, Time: l.Time, Attempts: l.Attempt, Reason: l.Reason,
		ContentType: l.Message.ContentType, Attributes: l.Message.Attributes, Size: len(l.Message.Body),
	}
	switch {
	case !c.Body:
	case json.Valid(l.Message.Body):
		j.Body = json.RawMessage(l.Message.Body)
	default:
		j.Body = l.Message.Body // base64
	}
	return j
}

// some are the letters that a command is about.
type some struct {
	IDs []string `arg:"" optional:"" name:"id" help:"IDs of messages."`
	All bool     `help:"All that there are now."`
}

func (s *some) pick(ctx context.Context, l *letters, d queue.DeadLetterer) ([]string, error) {
	if !s.All {
		slices.Sort(s.IDs)
		return slices.Compact(s.IDs), nil
	}
	found, err := d.DeadLetters(ctx, l.Topic, l.Group, allLetters)
	if err != nil {
		return nil, err
	}
	ids := make([]string, 0, len(found))
	for _, f := range found {
		ids = append(ids, f.Message.ID)
	}
	return ids, nil
}

// apply does something to the letters that are meant, and says how many there were.
func (s *some) apply(e *env, l *letters, done string, do func(queue.DeadLetterer) func(context.Context, string, string, ...string) (int, error)) error {
	if s.All == (len(s.IDs) > 0) {
		return unable("it is not said which messages", nil, "give IDs of messages, or --all")
	}
	missing := false
	err := l.open(e.ctx, func(d queue.DeadLetterer) error {
		ids, err := s.pick(e.ctx, l, d)
		if err != nil {
			return err
		}
		n, err := do(d)(e.ctx, l.Topic, l.Group, ids...)
		if err != nil {
			return err
		}
		fmt.Printf("%d %s\n", n, done)
		missing = !s.All && n < len(ids)
		return nil
	})
	if err == nil && missing {
		return unable("not all of these messages are dead letters of the topic", nil, "solstice dlq list "+l.Topic+" shows those that are")
	}
	return err
}

type dlqReplayCmd struct {
	letters
	some
}

// Help is kong's.
func (dlqReplayCmd) Help() string {
	return `They come last in their topic's queue, for that group only, with a fresh count of attempts. Mend first what they failed for.`
}

// Run is kong's.
func (c *dlqReplayCmd) Run(e *env) error {
	return c.apply(e, &c.letters, "replayed", func(d queue.DeadLetterer) func(context.Context, string, string, ...string) (int, error) {
		return d.Replay
	})
}

type dlqDropCmd struct {
	letters
	some
}

// Run is kong's.
func (c *dlqDropCmd) Run(e *env) error {
	return c.apply(e, &c.letters, "dropped", func(d queue.DeadLetterer) func(context.Context, string, string, ...string) (int, error) {
		return d.Drop
	})
}
