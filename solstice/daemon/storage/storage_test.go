package storage

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

func defaults() Database { return Database{DBPoolMaxSize: 16, DBPoolTimeoutMS: 5000} }

func TestEmbeddedDefaultsOpen(t *testing.T) {
	dir := t.TempDir()
	db, err := defaults().Open(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	q, err := OpenQueue(t.Context(), db, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = q.Close() }()
	if err := q.Publish(t.Context(), "topic", []queue.Message{{Body: []byte("x")}}, queue.PublishOptions{}); err != nil {
		t.Error(err)
	}
	blobs, err := Blobs{}.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = blobs.Close() }()
	if _, err := blobs.Put(t.Context(), "a/b", strings.NewReader("x"), blobstore.PutOptions{}); err != nil {
		t.Error(err)
	}
	for _, f := range []string{"solstice.db", "blobs"} {
		if _, err := os.Stat(filepath.Join(dir, f)); err != nil {
			t.Error(err)
		}
	}
}

func TestDatabaseProblemsHaveAdvice(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := lis.Addr().String()
	_ = lis.Close()
	secret := filepath.Join(t.TempDir(), "url")
	if err := os.WriteFile(secret, []byte("mysql://u:hunter2@h/d\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	garbage := filepath.Join(t.TempDir(), "garbage.db")
	if err := os.WriteFile(garbage, []byte(strings.Repeat("this is no database ", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, url, file, advice string }{
		{"scheme, from a file", "", secret, "postgres://"},
		{"refused", "postgres://u:hunter2@" + closed + "/d", "", "start PostgreSQL"},
		{"not a database", "sqlite:" + garbage, "", "SQLite database"},
	} {
		d := defaults()
		d.DatabaseURL, d.DatabaseURLFile = c.url, c.file
		_, err := d.Open(t.Context(), "", nil)
		p, ok := errors.AsType[*daemon.Problem](err)
		if !ok || !strings.Contains(p.Advice, c.advice) {
			t.Errorf("%s: error %v, want advice about %q", c.name, err, c.advice)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error shows the password: %v", c.name, err)
		}
	}
}

func TestNowhereToKeepState(t *testing.T) {
	if _, err := defaults().Open(t.Context(), "", nil); err == nil {
		t.Error("a database without URL and state directory was opened")
	}
	if _, err := (Blobs{}).Open(""); err == nil {
		t.Error("a blob store without directory was opened")
	}
	if _, err := (Database{}).Open(t.Context(), t.TempDir(), nil); err == nil {
		t.Error("a pool of no connections was opened")
	}
}
