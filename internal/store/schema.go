package store

import (
	"context"
	"fmt"
	"os"
	"slices"

	"github.com/uptrace/bun"
)

// SchemaOf names the last migration that a database has.
func SchemaOf(ctx context.Context, db bun.IDB) (string, error) {
	var last string
	err := db.NewSelect().TableExpr(migrationTable).ColumnExpr("coalesce(max(name), '')").Scan(ctx, &last)
	if err != nil {
		return "", fmt.Errorf("store: schema: %w", err)
	}
	return last, nil
}

// KnowsSchema reports whether this program has the migration of that name, and
// so can go on from a database that ends with it.
func KnowsSchema(name string) (bool, error) {
	files, err := embedded.ReadDir("migrations")
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(files, func(f os.DirEntry) bool { return f.Name() == name+".up.sql" }), nil
}
