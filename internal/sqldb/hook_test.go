package sqldb_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/uptrace/bun"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// TestStatementsAreTraced: below a recorded span each statement is one, and at
// debug level a line, neither of which shows values; elsewhere there is no span.
func TestStatementsAreTraced(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		spans := tracetest.NewSpanRecorder()
		tp := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
		var log bytes.Buffer
		db := open(t, url, sqldb.Options{TracerProvider: tp, Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
		exec(t, db, "CREATE TABLE secrets (x TEXT)")
		type row struct {
			bun.BaseModel `bun:"table:secrets"`
			X             string
		}
		if n := len(spans.Ended()); n != 0 {
			t.Errorf("%d spans without a parent", n)
		}
		ctx, parent := tp.Tracer("test").Start(t.Context(), "parent")
		if _, err := db.NewInsert().Model(&row{X: "hunter2"}).Exec(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := db.NewRaw("SELECT nonsense FROM secrets WHERE x = ?", "hunter2").Exec(ctx); err == nil {
			t.Fatal("there is no such column")
		}
		parent.End()
		var names []string
		for _, s := range spans.Ended() {
			names = append(names, s.Name()+" "+s.Status().Code.String())
			for _, a := range s.Attributes() {
				if strings.Contains(a.Value.String(), "hunter2") {
					t.Errorf("%s shows a value in %s", s.Name(), a.Key)
				}
			}
		}
		if got := strings.Join(names, ", "); got != "INSERT secrets Unset, SELECT Error, parent Unset" {
			t.Errorf("spans: %s", got)
		}
		if said := log.String(); strings.Contains(said, "hunter2") || !strings.Contains(said, "op=INSERT table=secrets") {
			t.Errorf("logged: %s", said)
		}
	})
}
