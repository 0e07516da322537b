package store

import (
	"fmt"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// TestRetentionPlans: what retention looks for it finds through an index that
// begins with it, whatever is kept.
func TestRetentionPlans(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		ctx := t.Context()
		db := openDB(t, url)
		if err := Migrate(ctx, db); err != nil {
			t.Fatal(err)
		}
		fill(t, db)
		for _, q := range []string{"UPDATE machines SET gone_at = (SELECT finished_at FROM runs WHERE 'm' || runs.id = machines.id)", "ANALYZE"} {
			if _, err := db.ExecContext(ctx, q); err != nil {
				t.Fatal(err)
			}
		}
		var runs []*Run
		for _, c := range []struct{ name, query, index string }{
			{"next repository", nextEndedRepo(db, "a3").String(), "runs_repo_ended"},
			{"repositories with ends", reposEnded(db, 1900, 1910).String(), "runs_ended"},
			{"newest", endedBeyond(db, "a1", 10).String(), "runs_repo_ended"},
			{"runs to remove", markable(db, "a1", position{50, "r1"}, RunGoing, 20).String(), "runs_repo_ended"},
			{"logs to remove", markable(db, "a1", position{50, "r1"}, LogsGoing, 20).String(), "runs_repo_logs"},
			{"leaving", leavingRuns(db, "", 20, &runs).String(), "runs_leaving"},
			{"of a commit", otherOfCommit(db, &Run{ID: "r1", RepoKey: "a1", Commit: "c7"}).String(), "runs_commit"},
			{"gone machines", goneMachines(db.NewSelect().TableExpr("machines").Column("id"), 5).Limit(20).String(), "machines_gone"},
		} {
			plan, err := queryPlan(ctx, db, c.query)
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			text := strings.Join(plan, "\n")
			if !strings.Contains(text, c.index) {
				t.Errorf("%s does not use %s:\n%s", c.name, c.index, text)
			}
			for _, line := range plan {
				if scansAll(line) || strings.Contains(line, "SCAN r ") || strings.Contains(line, "Hash") && strings.Contains(line, "Join") {
					t.Errorf("%s reads a whole table (%s):\n%s", c.name, strings.TrimSpace(line), text)
				}
			}
		}
	})
}

// TestDeliveryPlan: whether a webhook came before is found through indexes, however many
// came.
func TestDeliveryPlan(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		ctx := t.Context()
		db := openDB(t, url)
		if err := Migrate(ctx, db); err != nil {
			t.Fatal(err)
		}
		same := sameDeliveries(db, &Delivery{Forge: "f", Delivery: "d7", BodySum: "b7"}, 5).String()
		check := func(when string) {
			t.Helper()
			plan, err := queryPlan(ctx, db, same)
			if err != nil {
				t.Fatal(err)
			}
			text := strings.Join(plan, "\n")
			if !strings.Contains(text, "deliveries_delivery") || !strings.Contains(text, "deliveries_body") || strings.Contains(text, "Seq Scan") {
				t.Errorf("%s:\n%s", when, text)
			}
		}
		if !sqldb.IsPostgres(db) {
			check("without statistics")
		}
		var all []*Delivery
		for i := range 2000 {
			all = append(all, &Delivery{
				ID: fmt.Sprintf("%05d", i), Forge: "f", Delivery: fmt.Sprint("d", i), BodySum: fmt.Sprint("b", i),
				State: DeliveryAccepted, Body: []byte(strings.Repeat("x", 100)), ReceivedAt: int64(i),
			})
		}
		if _, err := db.NewInsert().Model(&all).Exec(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := db.ExecContext(ctx, "ANALYZE"); err != nil {
			t.Fatal(err)
		}
		check("with statistics")
	})
}
