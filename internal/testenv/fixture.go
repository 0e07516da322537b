package testenv

import (
	"os"
	"path/filepath"
	"testing"
)

// Fixture returns the content of a file that .mise/tasks/setup/fixtures fetches,
// by its path below the name and version of what it is part of:
// "github-openapi-23.0.2/generated/api.github.com.json".
func Fixture(t testing.TB, name string) []byte {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(cache, "solstice/fixtures", name))
	if err != nil {
		Missing(t, "the fixture "+name, ".mise/tasks/setup/fixtures fetches it: "+err.Error())
	}
	return b
}
