package sqlqueue

import (
	"context"
	"crypto/rand"
	"fmt"
)

// missedBeats is how many observations in a row have to find a beat unmoved
// before its process counts as dead; they are a third of the lease apart. An
// observer that was itself stopped makes no observations meanwhile, and neither
// does one that the database does not answer.
const missedBeats = 3

// register makes this process a reader of the topic and returns the row of the
// group, or for the empty one the row that collects broadcasts.
func (q *Queue) register(ctx context.Context, tx execer, topic, name, reader string) (gid int64, err error) {
	if err := q.lockGroups(ctx, tx); err != nil {
		return 0, err
	}
	s := newQuery(q.pg)
	s.WriteString(`INSERT INTO queue_readers (id, beat) VALUES (` + s.arg(reader) + `, 0) ON CONFLICT (id) DO NOTHING`)
	if _, err := s.exec(ctx, tx); err != nil {
		return 0, err
	}
	kind, row := kindGroup, name
	if name == "" {
		kind, row = kindBroadcast, "~"+reader // no valid group name
		// Only broadcasts so far: what the topic kept waits for its first
		// group, nothing more is kept.
		s := newQuery(q.pg)
		s.WriteString(`UPDATE queue_groups SET kind = 2 WHERE topic = ` + s.arg(topic) + ` AND kind = 1`)
		if _, err := s.exec(ctx, tx); err != nil {
			return 0, err
		}
		if err := q.placeholder(ctx, tx, topic, kindKept); err != nil {
			return 0, err
		}
	} else {
		// The first group takes over the row that kept messages, and with it
		// the messages.
		s := newQuery(q.pg)
		s.WriteString(`UPDATE queue_groups SET kind = 0, name = ` + s.arg(name) + ` WHERE topic = ` + s.arg(topic) + ` AND kind IN (1, 2)`)
		if _, err := s.exec(ctx, tx); err != nil {
			return 0, err
		}
	}
	s = newQuery(q.pg)
	s.WriteString(`INSERT INTO queue_groups (topic, name, kind, reader) VALUES (` + s.arg(topic) + `, ` + s.arg(row) + `, ` + s.arg(kind))
	if kind == kindBroadcast {
		s.WriteString(`, ` + s.arg(reader))
	} else {
		s.WriteString(`, NULL`)
	}
	s.WriteString(`) ON CONFLICT (topic, name) DO NOTHING`)
	if _, err := s.exec(ctx, tx); err != nil {
		return 0, err
	}
	s = newQuery(q.pg)
	s.WriteString(`SELECT id FROM queue_groups WHERE topic = ` + s.arg(topic) + ` AND name = ` + s.arg(row))
	ids, err := s.ints(ctx, tx)
	if err == nil && len(ids) != 1 {
		err = fmt.Errorf("sqlqueue: group %q of topic %q has %d rows", name, topic, len(ids))
	}
	if err != nil {
		return 0, err
	}
	return ids[0], nil
}

// unhear removes the row that collected broadcasts, unless a reader has come
// in the meantime.
func (q *Queue) unhear(ctx context.Context, tx execer, topic, reader string) error {
	q.mu.Lock()
	_, again := q.hearers[topic]
	q.mu.Unlock()
	if again {
		return nil
	}
	s := newQuery(q.pg)
	s.WriteString(`UPDATE queue_groups SET kind = 4, reader = NULL, name = '!' || id WHERE kind = 3 AND topic = ` + s.arg(topic) + ` AND reader = ` + s.arg(reader))
	_, err := s.exec(ctx, tx)
	return err
}

// forget ends a reader: its claims are ready again, its broadcasts collected
// no more.
func (q *Queue) forget(ctx context.Context, tx execer, reader string) error {
	s := newQuery(q.pg)
	s.WriteString(`DELETE FROM queue_readers WHERE id = ` + s.arg(reader))
	if _, err := s.exec(ctx, tx); err != nil {
		return err
	}
	gids, err := q.sweep(ctx, tx)
	if err != nil || len(gids) == 0 {
		return err
	}
	b := &batch{q: q, reader: reader, woken: gids}
	return b.notify(ctx, tx)
}

// sweep releases the claims, and ends the broadcasts, of processes that are not
// registered, and returns the groups whose messages became ready. Messages of
// an ended broadcast are deleted by the sweep after, when no publication that
// still saw it is under way.
func (q *Queue) sweep(ctx context.Context, tx execer) (map[int64]struct{}, error) {
	s := newQuery(q.pg)
	s.WriteString(`UPDATE queue_messages SET state = 0, reader = NULL
		WHERE state = 2 AND reader NOT IN (SELECT id FROM queue_readers) RETURNING gid`)
	gids, err := s.ints(ctx, tx)
	if err != nil {
		return nil, err
	}
	for _, text := range []string{
		`DELETE FROM queue_messages WHERE state = 0 AND gid IN (SELECT id FROM queue_groups WHERE kind = 4)`,
		`DELETE FROM queue_groups WHERE kind = 4`,
		`UPDATE queue_groups SET kind = 4, reader = NULL, name = '!' || id
			WHERE kind = 3 AND reader NOT IN (SELECT id FROM queue_readers)`,
	} {
		s := newQuery(q.pg)
		s.WriteString(text)
		if _, err := s.exec(ctx, tx); err != nil {
			return nil, err
		}
	}
	woken := map[int64]struct{}{}
	for _, id := range gids {
		woken[id] = struct{}{}
	}
	return woken, nil
}

// background starts what a process with readers does. The caller holds
// Queue.mu.
func (q *Queue) background() {
	q.alarm.set(0) // delayed messages of earlier processes
	q.wg.Go(q.beats)
	if q.pg {
		q.wg.Go(q.listen)
	} else {
		q.wg.Go(q.watchFile)
	}
}

// observer is what one process knows of the others, and of its own claims.
type observer struct {
	beats   map[string]int64
	missed  map[string]int
	unknown map[int64]struct{} // own claims that nobody here held last time
}

// beats shows that this process lives, and releases what dead ones hold.
func (q *Queue) beats() {
	ob := &observer{beats: map[string]int64{}, missed: map[string]int{}}
	for sleep(q.closing, q.o.Lease/missedBeats) {
		ctx, cancel := context.WithTimeout(q.watching, q.o.Lease)
		err := q.beat(ctx, ob)
		cancel()
		if err != nil && !q.isClosed() {
			q.log.Warn("queue: beat failed", "error", err)
		}
	}
}

func (q *Queue) beat(ctx context.Context, ob *observer) error {
	me := q.readerID()
	q.mu.Lock()
	held := make(map[int64]struct{}, len(q.held))
	for id := range q.held {
		held[id] = struct{}{}
	}
	q.mu.Unlock()
	var (
		gids    map[string]int64 // rows that collect broadcasts, when there are new ones
		beats   map[string]int64
		woken   map[int64]struct{}
		unknown map[int64]struct{}
	)
	err := q.settling.do(ctx, &op{task: func(ctx context.Context, tx execer) (err error) {
		s := newQuery(q.pg)
		s.WriteString(`UPDATE queue_readers SET beat = beat + 1 WHERE id = ` + s.arg(me))
		n, err := s.exec(ctx, tx)
		if err != nil {
			return err
		}
		if gids = nil; n == 0 {
			if gids, err = q.rebirth(ctx, tx, me); err != nil {
				return err
			}
		}
		if beats, err = q.others(ctx, tx, me); err != nil {
			return err
		}
		for id, beat := range beats {
			if ob.missed[id] < missedBeats-1 || ob.beats[id] != beat {
				continue
			}
			s := newQuery(q.pg)
			s.WriteString(`DELETE FROM queue_readers WHERE id = ` + s.arg(id) + ` AND beat = ` + s.arg(beat))
			if _, err := s.exec(ctx, tx); err != nil {
				return err
			}
			q.log.Warn("queue: a process seems dead, releasing what it held", "reader", id)
		}
		if woken, err = q.sweep(ctx, tx); err != nil {
			return err
		}
		unknown, err = q.audit(ctx, tx, me, held, ob.unknown, woken)
		return err
	}})
	if err != nil {
		return err
	}
	ob.observe(beats)
	ob.unknown = unknown
	if gids != nil {
		q.reborn(gids)
	}
	if len(woken) > 0 {
		q.stir(woken)
		return q.settling.do(ctx, &op{task: func(ctx context.Context, tx execer) error {
			return (&batch{q: q, reader: me, woken: woken}).notify(ctx, tx)
		}})
	}
	return nil
}

func (ob *observer) observe(beats map[string]int64) {
	missed := map[string]int{}
	for id, beat := range beats {
		if old, ok := ob.beats[id]; ok && old == beat {
			missed[id] = ob.missed[id] + 1
		}
	}
	ob.beats, ob.missed = beats, missed
}

// others reads the beats of the other processes.
func (q *Queue) others(ctx context.Context, tx execer, me string) (map[string]int64, error) {
	s := newQuery(q.pg)
	s.WriteString(`SELECT id, beat FROM queue_readers WHERE id <> ` + s.arg(me))
	rows, err := tx.QueryContext(ctx, s.String(), s.args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	out := map[string]int64{}
	for rows.Next() {
		var id string
		var beat int64
		if err := rows.Scan(&id, &beat); err != nil {
			return nil, err
		}
		out[id] = beat
	}
	return out, rows.Err()
}

// audit releases claims of this process that nobody in it knew of, now and a
// beat ago: the connection broke while they were made.
func (q *Queue) audit(ctx context.Context, tx execer, me string, held, before, woken map[int64]struct{}) (map[int64]struct{}, error) {
	s := newQuery(q.pg)
	s.WriteString(`SELECT id FROM queue_messages WHERE state = 2 AND reader = ` + s.arg(me))
	ids, err := s.ints(ctx, tx)
	if err != nil {
		return nil, err
	}
	unknown := map[int64]struct{}{}
	var lost []int64
	for _, id := range ids {
		if _, ok := held[id]; ok {
			continue
		}
		if _, ok := before[id]; ok {
			lost = append(lost, id)
		} else {
			unknown[id] = struct{}{}
		}
	}
	if len(lost) == 0 {
		return unknown, nil
	}
	s = newQuery(q.pg)
	s.WriteString(`UPDATE queue_messages SET state = 0, reader = NULL, attempt = attempt - 1 WHERE state = 2 AND ` +
		s.in("id", lost) + ` AND reader = ` + s.arg(me) + ` RETURNING gid`)
	gids, err := s.ints(ctx, tx)
	for _, id := range gids {
		woken[id] = struct{}{}
	}
	return unknown, err
}

// rebirth registers this process under a new ID after the others took it for
// dead, before its old claims are swept. Deliveries of the old one are settled
// for others: their Ack says so. It returns the rows that now collect
// broadcasts by topic.
func (q *Queue) rebirth(ctx context.Context, tx execer, old string) (map[string]int64, error) {
	q.log.Warn("queue: other processes took this one for dead; its deliveries go to them", "reader", old)
	q.mu.Lock()
	// Should the transaction fail, the next beat finds this ID missing, too.
	q.reader = rand.Text()
	me := q.reader
	clear(q.held)
	var topics []string
	for topic := range q.hearers {
		topics = append(topics, topic)
	}
	q.mu.Unlock()
	s := newQuery(q.pg)
	s.WriteString(`INSERT INTO queue_readers (id, beat) VALUES (` + s.arg(me) + `, 0)`)
	if _, err := s.exec(ctx, tx); err != nil {
		return nil, err
	}
	gids := map[string]int64{}
	for _, topic := range topics {
		gid, err := q.register(ctx, tx, topic, "", me)
		if err != nil {
			return nil, err
		}
		gids[topic] = gid
	}
	return gids, nil
}

// reborn reads broadcasts from their new rows.
func (q *Queue) reborn(gids map[string]int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for topic, gid := range gids {
		if h := q.hearers[topic]; h != nil && h.gid != gid {
			delete(q.groups, h.gid)
			h.gid = gid
			q.groups[gid] = &group{id: gid, topic: topic, dirty: true}
		}
	}
	q.dirtyAll()
}
