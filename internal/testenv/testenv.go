// Package testenv gives tests the real parts that Solstice works with, private
// to the test binary and gone when it ends, however it ends.
//
// A part that is not installed skips the test that asks for it and says so;
// in a binary built with the tag requireparts it fails the test.
package testenv

import (
	"path/filepath"
	"testing"
)

// Missing skips the test for want of a real part, or fails it under the build
// tag requireparts. how says how to get the part.
func Missing(t testing.TB, part, how string) {
	t.Helper()
	if requireParts {
		t.Fatalf("%s is required and not usable here: %s", part, how)
	}
	t.Skipf("skipped, %s is not usable here: %s", part, how)
}

// Databases runs fn as subtests sqlite and postgres, each with the URL (see
// internal/sqldb) of an empty database of its own.
func Databases(t *testing.T, fn func(t *testing.T, url string)) {
	t.Helper()
	t.Run("sqlite", func(t *testing.T) { fn(t, SQLite(t)) })
	t.Run("postgres", func(t *testing.T) { fn(t, Postgres(t)) })
}

// SQLite returns the URL of a database file that does not exist yet, in the
// test's temporary directory.
func SQLite(t testing.TB) string {
	t.Helper()
	return "sqlite:" + filepath.Join(t.TempDir(), "test.db")
}
