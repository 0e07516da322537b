package sqlqueue

import (
	"context"
	"time"

	"github.com/solstice-ci/solstice-go/queue"
)

const groupID = `(SELECT id FROM queue_groups WHERE kind = 0 AND topic = `

// DeadLetters implements queue.DeadLetterer.
func (q *Queue) DeadLetters(ctx context.Context, topic, group string, limit int) ([]queue.DeadLetter, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if q.isClosed() {
		return nil, queue.ErrClosed
	}
	s := newQuery(q.pg)
	s.WriteString(`SELECT ` + columns + `, due, reason FROM queue_messages WHERE state = 3 AND gid = ` + groupID +
		s.arg(topic) + ` AND name = ` + s.arg(group) + `) ORDER BY due, id LIMIT ` + s.arg(max(limit, 0)))
	rows, err := q.db.DB.QueryContext(ctx, s.String(), s.args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []queue.DeadLetter
	for rows.Next() {
		l := queue.DeadLetter{Topic: topic, Group: group}
		var id, died int64
		if l.Message, err = scanMessage(rows, &id, &l.Attempt, &died, &l.Reason); err != nil {
			return nil, err
		}
		l.Message.NotBefore, l.Time = time.Time{}, time.UnixMicro(died)
		out = append(out, l)
	}
	return out, rows.Err()
}

// Replay implements queue.DeadLetterer.
func (q *Queue) Replay(ctx context.Context, topic, group string, ids ...string) (int, error) {
	woken := map[int64]struct{}{} // read only once the transaction is over
	n, err := q.letters(ctx, `UPDATE queue_messages SET state = 0, attempt = 0, due = 0, reason = NULL`, topic, group, ids, woken)
	if err == nil {
		q.stir(woken)
	}
	return n, err
}

// Drop implements queue.DeadLetterer.
func (q *Queue) Drop(ctx context.Context, topic, group string, ids ...string) (int, error) {
	return q.letters(ctx, `DELETE FROM queue_messages`, topic, group, ids, map[int64]struct{}{})
}

// letters changes the dead letters with the given message IDs, and reports in
// woken which group has messages again.
func (q *Queue) letters(ctx context.Context, change, topic, group string, ids []string, woken map[int64]struct{}) (n int, err error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if q.isClosed() {
		return 0, queue.ErrClosed
	}
	if len(ids) == 0 {
		return 0, nil
	}
	err = q.settling.do(ctx, &op{task: func(ctx context.Context, tx execer) error {
		s := newQuery(q.pg)
		s.WriteString(change + ` WHERE state = 3 AND gid = ` + groupID + s.arg(topic) + ` AND name = ` + s.arg(group) +
			`) AND ` + s.inText("message_id", ids) + ` RETURNING gid`)
		gids, err := s.ints(ctx, tx)
		if err != nil {
			return err
		}
		n = len(gids)
		for _, id := range gids {
			woken[id] = struct{}{}
		}
		return (&batch{q: q, reader: q.readerID(), woken: woken}).notify(ctx, tx)
	}})
	if err != nil {
		return 0, err
	}
	return n, nil
}
