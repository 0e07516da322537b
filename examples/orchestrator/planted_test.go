package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// startOfConfig is where the program makes the engine's configuration.
const startOfConfig = `DB: db, Logger: log, `

// edit replaces a text of a source file, which has to be there exactly once.
type edit struct{ file, old, new string }

// plant builds the program with changes to its source, which stays as it is.
func plant(t *testing.T, name string, edits ...edit) (string, error) {
	t.Helper()
	changed := map[string]string{}
	for _, e := range edits {
		path, err := filepath.Abs(filepath.FromSlash(e.file))
		if err != nil {
			return "", err
		}
		source, ok := changed[path]
		if !ok {
			b, err := os.ReadFile(path)
			if err != nil {
				return "", err
			}
			source = string(b)
		}
		if n := strings.Count(source, e.old); n != 1 {
			return "", fmt.Errorf("%s has %d times what is to be changed:\n%s", e.file, n, e.old)
		}
		changed[path] = strings.Replace(source, e.old, e.new, 1)
	}
	dir := t.TempDir()
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	for path, source := range changed {
		overlay.Replace[path] = filepath.Join(dir, fmt.Sprintf("%d.go", len(overlay.Replace)))
		if err := os.WriteFile(overlay.Replace[path], []byte(source), 0o600); err != nil {
			return "", err
		}
	}
	b, err := json.Marshal(overlay)
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		return "", err
	}
	return build(name, "-overlay", file)
}
