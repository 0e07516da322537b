package messages_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
)

func FuzzRunRequest(f *testing.F) { fuzz[messages.RunRequest](f) }
func FuzzStatus(f *testing.F)     { fuzz[messages.Status](f) }
func FuzzWake(f *testing.F)       { fuzz[messages.Wake](f) }

// fuzz: what Decode accepts, of whatever bytes, can be encoded, then follows the
// schema, and means the same when it is decoded again.
func fuzz[T messages.Body](f *testing.F) {
	var none T
	dir := filepath.Join("testdata", none.Schema())
	files, err := os.ReadDir(dir)
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		m := readGolden(f, none.Schema(), file.Name()[:len(file.Name())-len(".json")])
		f.Add(m.ContentType, m.Attributes[messages.AttributeSchema], m.Body)
	}
	s := compile(f, none.Schema())
	f.Fuzz(func(t *testing.T, contentType, schema string, body []byte) {
		m := queue.Message{ContentType: contentType, Attributes: map[string]string{messages.AttributeSchema: schema}, Body: body}
		v, err := messages.Decode[T](m)
		if err != nil {
			return
		}
		first, err := messages.Encode(v)
		if err != nil {
			t.Fatal(err)
		}
		if err := follows(t, s, first.Body); err != nil {
			t.Errorf("%v\n%s", err, first.Body)
		}
		v, err = messages.Decode[T](first)
		if err != nil {
			t.Fatal(err)
		}
		if second, err := messages.Encode(v); err != nil || !bytes.Equal(first.Body, second.Body) {
			t.Errorf("%v\n%s\n%s", err, first.Body, second.Body)
		}
	})
}
