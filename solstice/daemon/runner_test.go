package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
)

func TestRunnerServesAgentsAndNothingElse(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"agent-linux-amd64": "an agent", "secret": "a secret", "agent-linux-amd64.sha256": "a lie"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "agent-linux-dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	h := NewAgents(dir).Handler()
	get := func(method, path string) (int, string) {
		t.Helper()
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		body, err := io.ReadAll(w.Result().Body)
		if err != nil {
			t.Fatal(err)
		}
		return w.Code, string(body)
	}
	sum := func(s string) string {
		d := sha256.Sum256([]byte(s))
		return hex.EncodeToString(d[:]) + "\n"
	}
	if code, body := get("GET", "/runner/linux/amd64"); code != http.StatusOK || body != "an agent" {
		t.Errorf("the agent: %d %q", code, body)
	}
	for range 2 { // the second from memory
		if code, body := get("GET", "/runner/linux/amd64.sha256"); code != http.StatusOK || body != sum("an agent") {
			t.Errorf("its sum: %d %q", code, body)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "agent-linux-amd64"), []byte("a newer agent"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, body := get("GET", "/runner/linux/amd64.sha256"); code != http.StatusOK || body != sum("a newer agent") {
		t.Errorf("the sum after it was replaced: %d %q", code, body)
	}
	for _, path := range []string{
		"/", "/runner/", "/runner/linux", "/runner/linux/arm64", "/runner/linux/dir", "/runner/linux/dir.sha256", "/secret", "/runner/secret",
		"/runner/linux/amd64/x", "/runner/linux/..%2Fsecret", "/runner/..%2F..%2Fetc/passwd", "/runner/linux/amd64.sha256.sha256", "/healthz",
	} {
		if code, body := get("GET", path); code != http.StatusNotFound {
			t.Errorf("GET %s: %d %q", path, code, body)
		}
	}
	if code, _ := get("PUT", "/runner/linux/amd64"); code != http.StatusMethodNotAllowed {
		t.Errorf("PUT: %d", code)
	}
}
