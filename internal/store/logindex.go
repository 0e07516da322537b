package store

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/bloblog"
)

// logStream and logEntry are the rows behind LogIndex.
type logStream struct {
	bun.BaseModel `bun:"table:log_streams,alias:log_stream"`

	Stream string `bun:",pk"`
	Epoch  int64
	Size   int64
	Sealed bool
	SHA256 string `bun:"sha256"` // hex
}

func (r *logStream) state() bloblog.State {
	sum, _ := hex.DecodeString(r.SHA256) // written by us
	if !r.Sealed {
		sum = nil
	}
	return bloblog.State{Epoch: r.Epoch, Size: r.Size, Sealed: r.Sealed, SHA256: sum}
}

type logEntry struct {
	bun.BaseModel `bun:"table:log_entries,alias:log_entry"`

	Stream    string `bun:",pk"`
	StartsAt  int64  `bun:",pk"`
	Epoch     int64
	Length    int64
	Key       string
	SHA256    string `bun:"sha256"` // hex; empty: none
	Compacted bool
}

func entryRow(stream string, e bloblog.Entry) *logEntry {
	return &logEntry{
		Stream: stream, StartsAt: e.Offset, Epoch: e.Epoch, Length: e.Length, Key: e.Key,
		SHA256: hex.EncodeToString(e.SHA256), Compacted: e.Compacted,
	}
}

func (r *logEntry) entry() bloblog.Entry {
	var sum []byte
	if r.SHA256 != "" {
		sum, _ = hex.DecodeString(r.SHA256)
	}
	return bloblog.Entry{Epoch: r.Epoch, Offset: r.StartsAt, Length: r.Length, Key: r.Key, SHA256: sum, Compacted: r.Compacted}
}

// LogIndex is the bloblog.Index in this database.
func (s *Store) LogIndex() bloblog.Index { return logIndex{s.db} }

type logIndex struct{ db *bun.DB }

var _ bloblog.Index = logIndex{}

// Stat implements bloblog.Index.
func (x logIndex) Stat(ctx context.Context, stream string) (bloblog.State, error) {
	r, err := logRow(ctx, x.db, stream, false)
	if err != nil {
		return bloblog.State{}, err
	}
	return r.state(), nil
}

// logRow reads a stream's row, locked when the caller is about to change it.
func logRow(ctx context.Context, db bun.IDB, stream string, lock bool) (*logStream, error) {
	r := &logStream{Stream: stream}
	q := db.NewSelect().Model(r).WherePK()
	if lock && sqldb.IsPostgres(db) {
		q = q.For("NO KEY UPDATE")
	}
	err := q.Scan(ctx)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("%w: %s", logstream.ErrNotFound, stream)
	}
	if err != nil {
		return nil, fmt.Errorf("store: log index: %w", err)
	}
	return r, nil
}

func (x logIndex) change(ctx context.Context, stream string, fn func(ctx context.Context, tx bun.Tx, r *logStream) error) error {
	return sqldb.InTx(ctx, x.db, func(ctx context.Context, tx bun.Tx) error {
		r, err := logRow(ctx, tx, stream, true)
		if err != nil {
			return err
		}
		return fn(ctx, tx, r)
	})
}

func (r *logStream) fenced(epoch int64) error {
	if epoch < r.Epoch {
		return fmt.Errorf("%w: %s is at epoch %d, not %d", logstream.ErrFenced, r.Stream, r.Epoch, epoch)
	}
	return nil
}

// Fence implements bloblog.Index.
func (x logIndex) Fence(ctx context.Context, stream string, epoch int64) (st bloblog.State, err error) {
	err = sqldb.InTx(ctx, x.db, func(ctx context.Context, tx bun.Tx) error {
		r, err := logRow(ctx, tx, stream, true)
		if errors.Is(err, logstream.ErrNotFound) {
			r, err = newLogRow(ctx, tx, stream, epoch)
		}
		if err != nil {
			return err
		}
		if err := r.fenced(epoch); err != nil {
			return err
		}
		if !r.Sealed && r.Epoch != epoch {
			r.Epoch = epoch
			if _, err := tx.NewUpdate().Model(r).WherePK().Column("epoch").Exec(ctx); err != nil {
				return fmt.Errorf("store: log index: %w", err)
			}
		}
		st = r.state()
		return nil
	})
	return st, err
}

// newLogRow makes a stream, unless it is one of a run whose logs retention has
// removed: what still writes then must not bring it back.
func newLogRow(ctx context.Context, tx bun.Tx, stream string, epoch int64) (*logStream, error) {
	if rest, ok := strings.CutPrefix(stream, streamPrefix); ok {
		runID, _, _ := strings.Cut(rest, "/")
		var kept Retention
		q := tx.NewSelect().TableExpr("runs").Column("retention").Where("id = ?", runID)
		if sqldb.IsPostgres(tx) {
			q = q.For("SHARE") // the mark of a removal waits for us, or we see it
		}
		err := q.Scan(ctx, &kept)
		if errors.Is(err, sql.ErrNoRows) || err == nil && !kept.HasLogs() {
			return nil, fmt.Errorf("%w: %s was removed by retention", logstream.ErrNotFound, stream)
		}
		if err != nil {
			return nil, fmt.Errorf("store: log index: %w", err)
		}
	}
	_, err := tx.NewInsert().Model(&logStream{Stream: stream, Epoch: epoch}).On("CONFLICT (stream) DO NOTHING").Exec(ctx)
	if err != nil {
		return nil, fmt.Errorf("store: log index: %w", err)
	}
	return logRow(ctx, tx, stream, true)
}

// Add implements bloblog.Index.
func (x logIndex) Add(ctx context.Context, stream string, e bloblog.Entry) error {
	err := x.change(ctx, stream, func(ctx context.Context, tx bun.Tx, r *logStream) error {
		switch err := r.fenced(e.Epoch); {
		case err != nil:
			return err
		case r.Sealed:
			return fmt.Errorf("%w: %s", logstream.ErrSealed, stream)
		case e.Offset < r.Size:
			return fmt.Errorf("%w: %s has %d bytes, entry at %d", logstream.ErrConflict, stream, r.Size, e.Offset)
		case e.Offset > r.Size:
			return &logstream.OffsetError{Stream: stream, Want: r.Size, Got: e.Offset}
		}
		r.Size, r.Epoch = r.Size+e.Length, e.Epoch
		if _, err := tx.NewInsert().Model(entryRow(stream, e)).Exec(ctx); err != nil {
			return fmt.Errorf("store: log index: %w", err)
		}
		if _, err := tx.NewUpdate().Model(r).WherePK().Column("size", "epoch").Exec(ctx); err != nil {
			return fmt.Errorf("store: log index: %w", err)
		}
		return nil
	})
	return sqldb.Settle(ctx, err, settlePatience, func(ctx context.Context) error {
		// The object's key is ours alone: if it is listed, the commit arrived.
		got, err := x.List(ctx, stream, e.Offset, 1)
		if err == nil && (len(got) != 1 || got[0].Key != e.Key) {
			err = fmt.Errorf("%w: entry %s of %s", ErrNotFound, e.Key, stream)
		}
		return err
	})
}

// List implements bloblog.Index.
func (x logIndex) List(ctx context.Context, stream string, from int64, limit int) ([]bloblog.Entry, error) {
	var rows []*logEntry
	err := x.db.NewSelect().Model(&rows).Where("stream = ?", stream).Where("starts_at + length > ?", from).
		// The entry that holds from begins at or before it; the index finds it.
		Where("starts_at >= coalesce((SELECT max(starts_at) FROM log_entries WHERE stream = ? AND starts_at <= ?), 0)", stream, from).
		Order("starts_at").Limit(int64(limit)).Scan(ctx)
	if err != nil {
		return nil, fmt.Errorf("store: log index: %w", err)
	}
	return entriesOf(rows), nil
}

func entriesOf(rows []*logEntry) []bloblog.Entry {
	var out []bloblog.Entry
	for _, r := range rows {
		out = append(out, r.entry())
	}
	return out
}

// Seal implements bloblog.Index.
func (x logIndex) Seal(ctx context.Context, stream string, s bloblog.State) error {
	return x.change(ctx, stream, func(ctx context.Context, tx bun.Tx, r *logStream) error {
		switch err := r.fenced(s.Epoch); {
		case err != nil:
			return err
		case r.Sealed:
			return fmt.Errorf("%w: %s", logstream.ErrSealed, stream)
		case r.Size != s.Size:
			return fmt.Errorf("%w: %s has %d bytes, not %d", logstream.ErrConflict, stream, r.Size, s.Size)
		}
		r.Epoch, r.Sealed, r.SHA256 = s.Epoch, true, hex.EncodeToString(s.SHA256)
		if _, err := tx.NewUpdate().Model(r).WherePK().Column("epoch", "sealed", "sha256").Exec(ctx); err != nil {
			return fmt.Errorf("store: log index: %w", err)
		}
		return nil
	})
}

// Replace implements bloblog.Index.
func (x logIndex) Replace(ctx context.Context, stream string, e bloblog.Entry) (old []bloblog.Entry, err error) {
	err = x.change(ctx, stream, func(ctx context.Context, tx bun.Tx, r *logStream) error {
		rows, err := takeEntries(ctx, tx, stream)
		if err != nil {
			return err
		}
		if !r.Sealed || e.Offset != 0 || e.Length != r.Size || len(rows) > 0 && rows[0].Compacted {
			return fmt.Errorf("%w: %s is not to be compacted", logstream.ErrConflict, stream)
		}
		old = entriesOf(rows)
		if _, err := tx.NewInsert().Model(entryRow(stream, e)).Exec(ctx); err != nil {
			return fmt.Errorf("store: log index: %w", err)
		}
		return nil
	})
	return old, err
}

func takeEntries(ctx context.Context, tx bun.Tx, stream string) ([]*logEntry, error) {
	var rows []*logEntry
	if err := tx.NewSelect().Model(&rows).Where("stream = ?", stream).Order("starts_at").Scan(ctx); err != nil {
		return nil, fmt.Errorf("store: log index: %w", err)
	}
	if _, err := tx.NewDelete().Model((*logEntry)(nil)).Where("stream = ?", stream).Exec(ctx); err != nil {
		return nil, fmt.Errorf("store: log index: %w", err)
	}
	return rows, nil
}

// Delete implements bloblog.Index.
func (x logIndex) Delete(ctx context.Context, stream string) (old []bloblog.Entry, err error) {
	err = x.change(ctx, stream, func(ctx context.Context, tx bun.Tx, r *logStream) error {
		rows, err := takeEntries(ctx, tx, stream)
		if err != nil {
			return err
		}
		old = entriesOf(rows)
		if _, err := tx.NewDelete().Model(r).WherePK().Exec(ctx); err != nil {
			return fmt.Errorf("store: log index: %w", err)
		}
		return nil
	})
	if errors.Is(err, logstream.ErrNotFound) {
		return nil, nil
	}
	return old, err
}
