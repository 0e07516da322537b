package sqlqueue

// The statements of this file are written by hand, not built by bun: they are
// the hot path, merge many rows, and bind bodies as they are.

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/solstice-ci/solstice-go/queue"
)

// execer is a *sql.DB, *sql.Conn or *sql.Tx.
type execer interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// channel is PostgreSQL's notification channel. A payload is the sender's
// reader ID and the groups whose messages became ready, or * for any; a d at
// its end says that messages were delayed.
const channel = "solstice_queue"

// Rows per statement: SQLite binds at most 32,766 values.
const maxRows = 1000

// query is a statement in the making; arg binds a value and returns its
// placeholder.
type query struct {
	strings.Builder
	pg   bool
	args []any
}

func (b *batch) query() *query { return newQuery(b.q.pg) }

func newQuery(pg bool) *query {
	q := &query{pg: pg}
	if pg {
		// A statement of fixed text is prepared once per connection, whatever
		// the pool's own default is.
		q.args = append(q.args, pgx.QueryExecModeCacheStatement)
	}
	return q
}

func (q *query) arg(v any) string {
	q.args = append(q.args, v)
	if q.pg {
		return "$" + strconv.Itoa(len(q.args)-1)
	}
	return "?"
}

// in binds IDs as one array or one placeholder each.
func (q *query) in(column string, ids []int64) string {
	if q.pg {
		return column + " = ANY(" + q.arg(ids) + "::bigint[])"
	}
	var sb strings.Builder
	sb.WriteString(column + " IN (")
	for i, id := range ids {
		if i > 0 {
			sb.WriteByte(',')
		}
		sb.WriteString(strconv.FormatInt(id, 10))
	}
	sb.WriteByte(')')
	return sb.String()
}

// inText does the same for texts.
func (q *query) inText(column string, texts []string) string {
	if q.pg {
		return column + " = ANY(" + q.arg(texts) + "::text[])"
	}
	p := make([]string, len(texts))
	for i, t := range texts {
		p[i] = q.arg(t)
	}
	return column + " IN (" + strings.Join(p, ",") + ")"
}

// now is the queue's time in microseconds: PostgreSQL's, so that all processes
// agree, or else the given one.
func (q *query) now(micros int64) string {
	if q.pg {
		return "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
	}
	return strconv.FormatInt(micros, 10)
}

func (q *query) exec(ctx context.Context, tx execer) (int64, error) {
	r, err := tx.ExecContext(ctx, q.String(), q.args...)
	if err != nil {
		return 0, err
	}
	return r.RowsAffected()
}

// ints runs a query that returns one column of numbers.
func (q *query) ints(ctx context.Context, tx execer) ([]int64, error) {
	rows, err := tx.QueryContext(ctx, q.String(), q.args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []int64
	for rows.Next() {
		var n int64
		if err := rows.Scan(&n); err != nil {
			return nil, err
		}
		out = append(out, n)
	}
	return out, rows.Err()
}

// row is one message to insert.
type row struct {
	topic, attributes string
	due               int64
	msg               *queue.Message
}

// insert writes one row per message and group, of all publications at once.
func (b *batch) insert(ctx context.Context, tx execer) error {
	var rows []row
	for _, p := range b.publishes {
		for i := range p.msgs {
			m := &p.msgs[i]
			r := row{topic: p.topic, msg: m}
			if len(m.Attributes) > 0 {
				j, err := json.Marshal(m.Attributes)
				if err != nil {
					return err
				}
				r.attributes = string(j)
			}
			if due := m.NotBefore.UnixMicro(); !m.NotBefore.IsZero() && due > b.now {
				r.due = due
			}
			rows = append(rows, r)
		}
	}
	for chunk := range slices.Chunk(rows, maxRows) {
		q := b.insertSQLite
		if b.q.pg {
			q = b.insertPostgres
		}
		if err := q(ctx, tx, chunk); err != nil {
			return err
		}
	}
	return nil
}

const insertInto = `INSERT INTO queue_messages (gid, state, due, message_id, content_type, attributes, body) `

func (b *batch) insertSQLite(ctx context.Context, tx execer, rows []row) error {
	q := b.query()
	// CROSS JOIN keeps SQLite from changing the order, which is the messages'.
	q.WriteString(insertInto + `SELECT g.id, CASE WHEN v.column2 > 0 AND g.kind <> 3 THEN 1 ELSE 0 END,
		v.column2, v.column3, v.column4, v.column5, v.column6 FROM (VALUES `)
	for i, r := range rows {
		if i > 0 {
			q.WriteByte(',')
		}
		q.args = append(q.args, r.topic, r.due, r.msg.ID, r.msg.ContentType, r.attributes, orEmpty(r.msg.Body))
		q.WriteString("(?,?,?,?,?,?)")
	}
	q.WriteString(`) v CROSS JOIN queue_groups g WHERE g.topic = v.column1 AND g.kind IN (0, 1, 3)
		AND (g.kind <> 3 OR g.reader <> ` + q.arg(b.reader) + `)`)
	_, err := q.exec(ctx, tx)
	return err
}

func (b *batch) insertPostgres(ctx context.Context, tx execer, rows []row) error {
	n := len(rows)
	topics, ids, types, attrs := make([]string, n), make([]string, n), make([]string, n), make([]string, n)
	dues, bodies := make([]int64, n), make([][]byte, n)
	for i, r := range rows {
		topics[i], dues[i], ids[i], types[i], attrs[i], bodies[i] = r.topic, r.due, r.msg.ID, r.msg.ContentType, r.attributes, orEmpty(r.msg.Body)
	}
	q := b.query()
	q.WriteString(`WITH ins AS (` + insertInto +
		`SELECT g.id, CASE WHEN v.due > 0 AND g.kind <> 3 THEN 1 ELSE 0 END, v.due, v.mid, v.ctype, v.attrs, v.body
		FROM unnest(` + q.arg(topics) + `::text[], ` + q.arg(dues) + `::bigint[], ` + q.arg(ids) + `::text[], ` +
		q.arg(types) + `::text[], ` + q.arg(attrs) + `::text[], ` + q.arg(bodies) + `::bytea[])
			WITH ORDINALITY AS v(topic, due, mid, ctype, attrs, body, n)
		JOIN queue_groups g ON g.topic = v.topic AND g.kind IN (0, 1, 3) AND (g.kind <> 3 OR g.reader <> ` + q.arg(b.reader) + `)
		ORDER BY v.n RETURNING gid, state)` + notifyFrom(q, b.reader))
	_, err := q.exec(ctx, tx)
	return err
}

// notifyFrom ends a statement whose CTE ins returns gid and state: it tells the
// other processes, in the same round trip.
func notifyFrom(q *query, reader string) string {
	return ` SELECT pg_notify('` + channel + `', ` + q.arg(reader) + `::text || ' ' ||
		CASE WHEN count(DISTINCT gid) > 100 THEN '*' ELSE string_agg(DISTINCT gid::text, ',') END ||
		CASE WHEN bool_or(state = 1) THEN ' d' ELSE '' END) FROM ins HAVING count(*) > 0`
}

func orEmpty(p []byte) []byte {
	if p == nil {
		return []byte{}
	}
	return p
}

// settle applies all verdicts: acks in one statement, likewise what is ready
// again at once, and the rare others one by one.
func (b *batch) settle(ctx context.Context, tx execer) error {
	many := map[verdict]map[int64]*op{}
	for _, o := range b.settles {
		s := o.settle
		switch {
		case s.reader != b.reader:
			o.err = queue.ErrSettled // taken from this process when it seemed dead
		case s.verdict == ack, s.verdict == unclaimed, s.verdict == retry && s.delay <= 0:
			if many[s.verdict] == nil {
				many[s.verdict] = map[int64]*op{}
			}
			many[s.verdict][s.id] = o
		default:
			if err := b.settleOne(ctx, tx, o); err != nil {
				return err
			}
		}
	}
	for v, ops := range many {
		if err := b.settleMany(ctx, tx, v, ops); err != nil {
			return err
		}
	}
	if len(b.woken) > 0 || b.delays {
		return b.notify(ctx, tx)
	}
	return nil
}

func (b *batch) settleMany(ctx context.Context, tx execer, v verdict, ops map[int64]*op) error {
	ids := make([]int64, 0, len(ops))
	for id, o := range ops {
		ids = append(ids, id)
		if o.settle.unsure {
			o.err = nil
		} else {
			o.err = queue.ErrSettled
		}
		if v != ack {
			b.woken[o.settle.gid] = struct{}{}
		}
	}
	slices.Sort(ids) // one order of locks for all
	q := b.query()
	switch v {
	case ack:
		q.WriteString(`DELETE FROM queue_messages`)
	case unclaimed:
		q.WriteString(`UPDATE queue_messages SET state = 0, reader = NULL, attempt = attempt - 1`)
	default:
		q.WriteString(`UPDATE queue_messages SET state = 0, reader = NULL`)
	}
	q.WriteString(` WHERE state = 2 AND ` + q.in("id", ids) + ` AND reader = ` + q.arg(b.reader) + ` RETURNING id`)
	hit, err := q.ints(ctx, tx)
	for _, id := range hit {
		ops[id].err = nil
	}
	return err
}

func (b *batch) settleOne(ctx context.Context, tx execer, o *op) error {
	s, q := o.settle, b.query()
	if s.verdict == bury {
		q.WriteString(`UPDATE queue_messages SET state = 3, reader = NULL, due = ` + q.now(b.now) + `, reason = ` + q.arg(s.reason))
	} else {
		q.WriteString(`UPDATE queue_messages SET state = 1, reader = NULL, due = ` + q.now(b.now) + ` + ` + q.arg(s.delay.Microseconds()))
		b.delays = true
	}
	q.WriteString(` WHERE state = 2 AND id = ` + q.arg(s.id) + ` AND reader = ` + q.arg(b.reader))
	n, err := q.exec(ctx, tx)
	o.err = nil
	if n == 0 && !s.unsure {
		o.err = queue.ErrSettled
	}
	return err
}

// notify tells the other processes about b.woken and b.delays; SQLite's see
// that the file changed.
func (b *batch) notify(ctx context.Context, tx execer) error {
	if !b.q.pg {
		return nil
	}
	payload := b.reader + " " + groupList(b.woken)
	if b.delays {
		payload += " d"
	}
	q := b.query()
	q.WriteString(`SELECT pg_notify('` + channel + `', ` + q.arg(payload) + `::text)`)
	_, err := q.exec(ctx, tx)
	return err
}

func groupList(gids map[int64]struct{}) string {
	if len(gids) > 100 {
		return "*"
	}
	var parts []string
	for id := range gids {
		parts = append(parts, strconv.FormatInt(id, 10))
	}
	return strings.Join(parts, ",")
}

// ripen makes ready what is due, and finds out when the next message will be.
func (b *batch) ripen(ctx context.Context, tx execer) error {
	q := b.query()
	pick := `SELECT id FROM queue_messages WHERE state = 1 AND due <= ` + q.now(b.now) + ` ORDER BY due`
	if q.pg {
		pick += ` FOR UPDATE SKIP LOCKED`
	}
	q.WriteString(`UPDATE queue_messages SET state = 0 WHERE id IN (` + pick + `) RETURNING gid`)
	gids, err := q.ints(ctx, tx)
	if err != nil {
		return err
	}
	for _, id := range gids {
		b.woken[id] = struct{}{}
	}
	b.next, err = nextDue(ctx, tx, b.q.pg, b.now)
	if err != nil || len(b.woken) == 0 {
		return err
	}
	return b.notify(ctx, tx)
}

// nextDue is the time until the next delayed message, negative when there is
// none.
func nextDue(ctx context.Context, tx execer, pg bool, now int64) (time.Duration, error) {
	q := newQuery(pg)
	q.WriteString(`SELECT due - ` + q.now(now) + ` FROM queue_messages WHERE state = 1 ORDER BY due LIMIT 1`)
	next, err := q.ints(ctx, tx)
	if err != nil || len(next) == 0 {
		return -1, err
	}
	return max(time.Duration(next[0])*time.Microsecond, 0), nil
}

const columns = `id, attempt, due, message_id, content_type, attributes, body`

// claim takes messages for readers of a group, or all there are for the
// broadcast readers of this process.
func (b *batch) claim(ctx context.Context, tx execer, w want) ([]claimed, error) {
	q := b.query()
	gid := q.arg(w.g.id)
	pick := `(SELECT id FROM queue_messages WHERE state = 0 AND gid = ` + gid + ` ORDER BY id LIMIT ` + q.arg(w.n)
	if q.pg {
		pick += ` FOR UPDATE SKIP LOCKED`
	}
	pick += `)`
	if w.g.name == "" {
		q.WriteString(`DELETE FROM queue_messages WHERE id IN ` + pick)
	} else {
		if !q.pg { // placeholders count by place
			q.args = []any{b.reader, w.g.id, w.n}
			q.WriteString(`UPDATE queue_messages SET state = 2, attempt = attempt + 1, reader = ? WHERE id IN ` + pick)
		} else {
			q.WriteString(`UPDATE queue_messages SET state = 2, attempt = attempt + 1, reader = ` + q.arg(b.reader) + ` WHERE id IN ` + pick)
		}
	}
	q.WriteString(` RETURNING ` + columns)
	rows, err := tx.QueryContext(ctx, q.String(), q.args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []claimed
	for rows.Next() {
		var c claimed
		if c.msg, err = scanMessage(rows, &c.id, &c.attempt); err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, rows.Err()
}

// scanMessage reads columns, and what more the query returns.
func scanMessage(rows *sql.Rows, id *int64, attempt *int, more ...any) (m queue.Message, err error) {
	var due int64
	var attributes string
	to := append([]any{id, attempt, &due, &m.ID, &m.ContentType, &attributes, &m.Body}, more...)
	if err := rows.Scan(to...); err != nil {
		return m, err
	}
	if due > 0 {
		m.NotBefore = time.UnixMicro(due)
	}
	if attributes != "" {
		if err := json.Unmarshal([]byte(attributes), &m.Attributes); err != nil {
			return m, fmt.Errorf("attributes of message %s: %w", m.ID, err)
		}
	}
	return m, nil
}
