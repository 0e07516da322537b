package messages_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
)

var update = flag.Bool("update", false, "write the golden files of what is encoded now")

// golden is a message in a file.
type golden struct {
	ID          string            `json:"id,omitempty"`
	ContentType string            `json:"content_type,omitempty"`
	Attributes  map[string]string `json:"attributes,omitempty"`
	Body        json.RawMessage   `json:"body"`
}

func readGolden(t testing.TB, schema, variant string) queue.Message {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", schema, variant+".json"))
	if err != nil {
		t.Fatal(err)
	}
	var g golden
	if err := json.Unmarshal(b, &g); err != nil {
		t.Fatalf("%s/%s: %v", schema, variant, err)
	}
	return queue.Message{ID: g.ID, ContentType: g.ContentType, Attributes: g.Attributes, Body: g.Body}
}

// compile reads the schema that a message's body follows.
func compile(t testing.TB, schema string) *jsonschema.Schema {
	t.Helper()
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	c.UseLoader(noLoader{}) // nothing but what is in the file, and the meta-schema
	doc, id := schemaDoc(t, schema)
	if err := c.AddResource(id, doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile(id)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

type noLoader struct{}

func (noLoader) Load(url string) (any, error) {
	return nil, fmt.Errorf("%s is not part of the schema", url)
}

func schemaDoc(t testing.TB, schema string) (doc map[string]any, id string) {
	t.Helper()
	b, err := fs.ReadFile(messages.Schemas(), schema+".schema.json")
	if err != nil {
		t.Fatal(err)
	}
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		t.Fatalf("%s: %v", schema, err)
	}
	doc = v.(map[string]any)
	if doc["$schema"] != "https://json-schema.org/draft/2020-12/schema" || doc["$id"] != "https://solstice-ci.org/schema/"+schema+".json" {
		t.Errorf("%s: $schema %v, $id %v", schema, doc["$schema"], doc["$id"])
	}
	return doc, doc["$id"].(string)
}

func follows(t testing.TB, s *jsonschema.Schema, body []byte) error {
	t.Helper()
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	return s.Validate(v)
}

var (
	someTime = time.Date(2026, 11, 25, 12, 0, 0, 123456000, time.UTC)
	someRepo = forge.Repo{
		Owner: "acme/tools", Name: "widget", ID: "42", URL: "https://forge.example/acme/tools/widget",
		CloneURL: "https://forge.example/acme/tools/widget.git", DefaultBranch: "main", Private: true,
	}
)

const someCommit = "5ca1ab1e5ca1ab1e5ca1ab1e5ca1ab1e5ca1ab1e"

// The values of the golden files. "full" has every field: it is what this
// program writes, and -update writes it. The others are what was written once,
// by this program or by hand, and stay as they are.
var (
	runRequests = map[string]messages.RunRequest{
		"full": {
			Forge: "forgejo", Repo: someRepo, Commit: someCommit, Ref: "refs/pull/7/head",
			Event: forge.Event{
				Kind: forge.KindPullRequest, Action: "synchronized", Delivery: "f6266f16-1bf3-46a5-9ea4-602e06ead473", Repo: someRepo,
				Ref: "refs/pull/7/head", Commit: someCommit, Before: strings.Repeat("0", 40), Sender: forge.User{ID: "1", Login: "alice"},
				Title: "Less noise", Message: "Less noise\n\nThe fan is quiet now.\n",
				PullRequest: &forge.PullRequest{
					Number: 7, Title: "Less noise", URL: "https://forge.example/acme/tools/widget/pulls/7", HeadRef: "quiet", HeadCommit: someCommit,
					HeadRepo: forge.Repo{Owner: "alice", Name: "widget"}, BaseRef: "main", BaseCommit: strings.Repeat("a", 40), MergeRef: "refs/pull/7/merge",
					Author: forge.User{ID: "1", Login: "alice"}, Fork: true, Draft: true,
				},
				ChangedPaths: []string{"fan.go", "docs/é \u2028.md"}, ExternalID: "0192", Repos: []forge.Repo{someRepo}, Time: someTime,
			},
			Inputs: map[string]string{"level": "3"}, Workflow: "ci", Jobs: []string{"test", "lint"}, IdempotencyKey: "k", Priority: -1,
			AwaitApproval: "a stranger's change",
		},
		"oldest":         {Forge: "local", Repo: forge.Repo{Name: "widget"}, Ref: "refs/heads/main", Priority: 2},
		"minimal":        {Repo: forge.Repo{Name: "widget"}},
		"unknown-fields": {Repo: forge.Repo{Owner: "acme", Name: "widget"}, Event: forge.Event{Kind: "merge_queue", Delivery: "d"}},
	}
	statuses = map[string]messages.Status{
		"full": {
			Forge: "forgejo", Repo: someRepo, Commit: someCommit, Status: forge.Status{
				Key: "solstice/ci/test (go 1.26)", Version: 1 << 60, State: forge.StatusFailure, Description: "Failed after 3s",
				TargetURL: "https://ci.example/runs/1", ExternalID: "0192", StartedAt: someTime, FinishedAt: someTime.Add(3 * time.Second),
				Summary: "1 of 2 steps failed", Actions: []forge.Action{forge.ActionCancel, forge.ActionApprove},
				Annotations: []forge.Annotation{{Path: ".solstice/workflow.yaml", Line: 3, Column: 5, Level: forge.LevelFailure, Message: "unknown key"}},
			},
		},
		"oldest":         {Forge: "local", Repo: forge.Repo{Name: "widget"}, Commit: someCommit, Status: forge.Status{Key: "solstice/ci", Version: 1, State: forge.StatusPending}},
		"unknown-fields": {Forge: "local", Repo: forge.Repo{Name: "widget"}, Commit: someCommit, Status: forge.Status{Key: "solstice/ci", Version: 3, State: forge.StatusSuccess}},
	}
	wakes = map[string]messages.Wake{
		"full":           {From: "0192d2a0-6b1e-7000-8000-000000000001", Labels: []string{"debian-12", "illumos-latest"}},
		"oldest":         {From: "0192d2a0-6b1e-7000-8000-000000000001", Labels: []string{"host"}},
		"minimal":        {From: "0192d2a0-6b1e-7000-8000-000000000001"},
		"unknown-fields": {From: "o", Labels: []string{"host"}},
	}
)

func TestGoldens(t *testing.T) {
	t.Run("runrequest", func(t *testing.T) { goldens(t, runRequests) })
	t.Run("status", func(t *testing.T) { goldens(t, statuses) })
	t.Run("wake", func(t *testing.T) { goldens(t, wakes) })
}

func goldens[T messages.Body](t *testing.T, values map[string]T) {
	schema := values["full"].Schema()
	s := compile(t, schema)
	files, err := os.ReadDir(filepath.Join("testdata", schema))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != len(values) {
		t.Errorf("%d golden files, %d values", len(files), len(values))
	}
	for variant, want := range values {
		encoded, err := messages.Encode(want)
		if err != nil {
			t.Fatalf("%s: %v", variant, err)
		}
		if err := follows(t, s, encoded.Body); err != nil {
			t.Errorf("%s, encoded: %v", variant, err)
		}
		if encoded.ContentType != "application/vnd.solstice."+schema+"+json" || encoded.Attributes["solstice-schema"] != schema {
			t.Errorf("%s, encoded: type %q, attributes %v", variant, encoded.ContentType, encoded.Attributes)
		}
		if variant == "full" {
			unset(t, schema, reflect.ValueOf(want))
			b, err := json.MarshalIndent(golden{ContentType: encoded.ContentType, Attributes: encoded.Attributes, Body: encoded.Body}, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", schema, "full.json")
			if *update {
				if err := os.WriteFile(file, append(b, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if have, err := os.ReadFile(file); err != nil || !bytes.Equal(have, append(b, '\n')) {
				t.Errorf("%s is not what is written now (%v):\n%s", file, err, b)
			}
		}
		m := readGolden(t, schema, variant)
		if err := follows(t, s, m.Body); err != nil {
			t.Errorf("%s: %v", variant, err)
		}
		got, err := messages.Decode[T](m)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: decoded to %+v, %v\nwant %+v", variant, got, err, want)
		}
		if strings.HasPrefix(variant, "unknown") && !bytes.Contains(m.Body, []byte(`"no_such_field"`)) {
			t.Errorf("%s has no unknown field", variant)
		}
	}
}

// unset fails for fields of a value, and of what it has inside, that are not set.
func unset(t *testing.T, where string, v reflect.Value) {
	t.Helper()
	switch {
	case v.IsZero():
		t.Errorf("%s is not set", where)
	case v.Kind() == reflect.Pointer:
		unset(t, where, v.Elem())
	case isObject(v.Type()):
		// Of a repository in passing, the name will do.
		if v.Type() == reflect.TypeFor[forge.Repo]() && where != "runrequest.v1.Repo" && where != "status.v1.Repo" {
			return
		}
		for i := range v.NumField() {
			unset(t, where+"."+v.Type().Field(i).Name, v.Field(i))
		}
	}
}

func isObject(t reflect.Type) bool {
	return t.Kind() == reflect.Struct && t != reflect.TypeFor[time.Time]()
}

// TestSchemasAndTypesAgree: every field of a type is in its schema, and the
// other way round, with the same kind of value.
func TestSchemasAndTypesAgree(t *testing.T) {
	entries, err := fs.ReadDir(messages.Schemas(), ".")
	if err != nil || len(entries) != 3 {
		t.Fatalf("%d schemas, %v: each needs a line here", len(entries), err)
	}
	for _, body := range []interface{ Schema() string }{messages.RunRequest{}, messages.Status{}, messages.Wake{}} {
		doc, _ := schemaDoc(t, body.Schema())
		c := comparison{t: t, defs: map[string]any{}, used: map[string]bool{}}
		if defs, ok := doc["$defs"].(map[string]any); ok {
			c.defs = defs
		}
		c.compare(body.Schema(), reflect.TypeOf(body), doc)
		for name := range c.defs {
			if !c.used[name] {
				t.Errorf("%s: nothing refers to $defs/%s", body.Schema(), name)
			}
		}
	}
}

type comparison struct {
	t    *testing.T
	defs map[string]any
	used map[string]bool
}

func (c *comparison) compare(where string, typ reflect.Type, node map[string]any) {
	c.t.Helper()
	described := node["description"] != nil
	required, _ := node["required"].([]any)
	if ref, ok := node["$ref"].(string); ok {
		name := strings.TrimPrefix(ref, "#/$defs/")
		c.used[name] = true
		node, ok = c.defs[name].(map[string]any)
		if !ok {
			c.t.Fatalf("%s: no %s", where, ref)
		}
		described = described || node["description"] != nil
		more, _ := node["required"].([]any)
		required = append(required, more...)
	}
	if !described && !strings.HasSuffix(where, "[]") {
		c.t.Errorf("%s has no description", where)
	}
	if typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	kind := node["type"]
	if node["enum"] != nil {
		kind = "string"
	}
	want := map[reflect.Kind]string{
		reflect.String: "string", reflect.Bool: "boolean", reflect.Int: "integer", reflect.Int64: "integer",
		reflect.Slice: "array", reflect.Map: "object", reflect.Struct: "object",
	}[typ.Kind()]
	if typ == reflect.TypeFor[time.Time]() {
		want = "string"
		if node["format"] != "date-time" {
			c.t.Errorf("%s: format %v of a time", where, node["format"])
		}
	}
	if kind != want {
		c.t.Errorf("%s: type %v in the schema, %s in Go", where, kind, typ)
		return
	}
	switch {
	case typ.Kind() == reflect.Slice:
		c.compare(where+"[]", typ.Elem(), node["items"].(map[string]any))
	case typ.Kind() == reflect.Map:
		c.compare(where+"[]", typ.Elem(), node["additionalProperties"].(map[string]any))
	case isObject(typ):
		if node["additionalProperties"] != nil {
			c.t.Errorf("%s: unknown fields are not simply ignored", where)
		}
		properties := node["properties"].(map[string]any)
		var fields []string
		for i := range typ.NumField() {
			f := typ.Field(i)
			name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
			fields = append(fields, name)
			property, ok := properties[name].(map[string]any)
			if name == "" || !ok {
				c.t.Errorf("%s: %s (%q) is not in the schema", where, f.Name, name)
				continue
			}
			if slices.Contains(required, any(name)) && options != "" {
				c.t.Errorf("%s: %s is required and may be left out", where, name)
			}
			c.compare(where+"."+name, f.Type, property)
		}
		for name := range properties {
			if !slices.Contains(fields, name) {
				c.t.Errorf("%s: %s has no field in Go", where, name)
			}
		}
		for _, name := range required {
			if !slices.Contains(fields, name.(string)) {
				c.t.Errorf("%s: %v is required and no field", where, name)
			}
		}
	}
}

// TestRequiredFields: what the schema requires, the decoder does too.
func TestRequiredFields(t *testing.T) {
	t.Run("runrequest", func(t *testing.T) { requiredFields[messages.RunRequest](t, "repo", "repo.name") })
	t.Run("status", func(t *testing.T) {
		requiredFields[messages.Status](t, "forge", "repo", "repo.name", "commit", "status", "status.key", "status.version", "status.state")
	})
	t.Run("wake", func(t *testing.T) { requiredFields[messages.Wake](t, "from") })
}

func requiredFields[T messages.Body](t *testing.T, want ...string) {
	var none T
	s := compile(t, none.Schema())
	full := readGolden(t, none.Schema(), "full")
	var found []string
	var walk func(prefix string, get func(root map[string]any) map[string]any)
	walk = func(prefix string, get func(map[string]any) map[string]any) {
		var root map[string]any
		if err := json.Unmarshal(full.Body, &root); err != nil {
			t.Fatal(err)
		}
		for key, value := range get(root) {
			var copied map[string]any
			if err := json.Unmarshal(full.Body, &copied); err != nil {
				t.Fatal(err)
			}
			delete(get(copied), key)
			m := full
			m.Body, _ = json.Marshal(copied)
			_, err := messages.Decode[T](m)
			invalid := follows(t, s, m.Body)
			if (err == nil) != (invalid == nil) {
				t.Errorf("without %s%s: Decode says %v, the schema %v", prefix, key, err, invalid)
			}
			if err != nil {
				found = append(found, prefix+key)
				if !errors.Is(err, messages.ErrBody) {
					t.Errorf("without %s%s: %v", prefix, key, err)
				}
			}
			if _, ok := value.(map[string]any); ok {
				walk(prefix+key+".", func(root map[string]any) map[string]any { return get(root)[key].(map[string]any) })
			}
		}
	}
	walk("", func(root map[string]any) map[string]any { return root })
	slices.Sort(found)
	slices.Sort(want)
	if !slices.Equal(found, want) {
		t.Errorf("required are %q, want %q", found, want)
	}
}

func TestRefused(t *testing.T) {
	const typed, schema = "application/vnd.solstice.wake.v1+json", "wake.v1"
	for _, c := range []struct {
		name, contentType, schema, body string
		want                            error
	}{
		{"good", typed, schema, `{"from":"o"}`, nil},
		{"by content type", typed, "", `{"from":"o"}`, nil},
		{"by attribute", "", schema, `{"from":"o"}`, nil},
		{"plain JSON with an attribute", "application/json", schema, `{"from":"o"}`, nil},
		{"content type with a parameter", "Application/vnd.solstice.wake.v1+json; charset=utf-8", "", `{"from":"o"}`, nil},
		{"unnamed", "", "", `{"from":"o"}`, messages.ErrSchema},
		{"plain JSON", "application/json", "", `{"from":"o"}`, messages.ErrSchema},
		{"another message", "application/vnd.solstice.status.v1+json", "status.v1", `{"from":"o"}`, messages.ErrSchema},
		{"contradiction", "application/vnd.solstice.wake.v2+json", schema, `{"from":"o"}`, messages.ErrSchema},
		{"no version", "", "wake", `{"from":"o"}`, messages.ErrSchema},
		{"a version that is none", "", "wake.vx", `{"from":"o"}`, messages.ErrSchema},
		{"a longer name", "", "wake.v1.v2", `{"from":"o"}`, messages.ErrSchema},
		{"version 2", "application/vnd.solstice.wake.v2+json", "wake.v2", `{"from":"o"}`, messages.ErrVersion},
		{"version 2 by attribute", "", "wake.v2", `{"from":"o"}`, messages.ErrVersion},
		{"version 0 by content type", "application/vnd.solstice.wake.v0+json", "", `{"from":"o"}`, messages.ErrVersion},
		{"version 10", "", "wake.v10", "not even JSON", messages.ErrVersion},
		{"required field missing", typed, schema, `{"labels":["a"]}`, messages.ErrBody},
		{"empty", typed, schema, ``, messages.ErrBody},
		{"null", typed, schema, `null`, messages.ErrBody},
		{"a list", typed, schema, `[]`, messages.ErrBody},
		{"another kind of value", typed, schema, `{"from":1}`, messages.ErrBody},
		{"two values", typed, schema, `{"from":"o"} {}`, messages.ErrBody},
	} {
		m := queue.Message{ContentType: c.contentType, Body: []byte(c.body)}
		if c.schema != "" {
			m.Attributes = map[string]string{messages.AttributeSchema: c.schema}
		}
		w, err := messages.Decode[messages.Wake](m)
		if !errors.Is(err, c.want) || (err == nil) != (w.From == "o") {
			t.Errorf("%s: %+v, %v, want %v", c.name, w, err, c.want)
		}
		for _, other := range []error{messages.ErrSchema, messages.ErrVersion, messages.ErrBody} {
			if other != c.want && errors.Is(err, other) { //nolint:errorlint // the very same
				t.Errorf("%s: also %v", c.name, other)
			}
		}
	}
}

func TestEncodeRefuses(t *testing.T) {
	good := statuses["oldest"]
	for name, change := range map[string]func(*messages.Status){
		"no forge":                func(s *messages.Status) { s.Forge = "" },
		"no commit":               func(s *messages.Status) { s.Commit = "" },
		"no repository":           func(s *messages.Status) { s.Repo = forge.Repo{Owner: "acme"} },
		"a name that none can be": func(s *messages.Status) { s.Repo.Name = ".." },
		"no such state":           func(s *messages.Status) { s.Status.State = "great" },
		"a key too long":          func(s *messages.Status) { s.Status.Key = strings.Repeat("k", forge.MaxStatusKeyBytes+1) },
		"a year that JSON cannot": func(s *messages.Status) { s.Status.StartedAt = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) },
	} {
		s := good
		change(&s)
		if m, err := messages.Encode(s); !errors.Is(err, messages.ErrBody) || m.Body != nil {
			t.Errorf("%s: %v, %s", name, err, m.Body)
		}
	}
	if _, err := messages.Encode(good); err != nil {
		t.Error(err)
	}
}

// TestHandler: a consumer puts what it cannot read to the dead letters at once,
// says why, and goes on with the next message.
func TestHandler(t *testing.T) {
	q := memqueue.New()
	defer q.Close()
	good, err := messages.Encode(runRequests["minimal"])
	if err != nil {
		t.Fatal(err)
	}
	good.ID = "good"
	newer, unnamed, lacking := good.Clone(), good.Clone(), good.Clone()
	newer.ID, newer.ContentType, newer.Attributes[messages.AttributeSchema] = "newer", "application/vnd.solstice.runrequest.v2+json", "runrequest.v2"
	unnamed.ID, unnamed.ContentType, unnamed.Attributes = "unnamed", "", nil
	lacking.ID, lacking.Body = "lacking", []byte(`{"commit":"x"}`)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	handled := make(chan queue.Message, 4)
	c := queue.Consumer{Queue: q, Topic: messages.TopicRunRequest, Group: messages.Group, Handler: messages.Handler(
		func(_ context.Context, m queue.Message, r messages.RunRequest) error {
			if r.Repo.Name != "widget" {
				t.Errorf("got %+v", r)
			}
			handled <- m
			return nil
		})}
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	if err := q.Publish(ctx, messages.TopicRunRequest, []queue.Message{newer, unnamed, lacking, good}, queue.PublishOptions{}); err != nil {
		t.Fatal(err)
	}
	if m := <-handled; m.ID != "good" {
		t.Errorf("message %s was handled", m.ID)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	letters, err := q.DeadLetters(t.Context(), messages.TopicRunRequest, messages.Group, 10)
	if err != nil {
		t.Fatal(err)
	}
	reasons := map[string]string{"newer": `"runrequest.v2"; this program reads runrequest.v1`, "unnamed": "solstice-schema", "lacking": "repo.name is missing"}
	if len(letters) != len(reasons) {
		t.Errorf("%d dead letters", len(letters))
	}
	for _, l := range letters {
		if want, ok := reasons[l.Message.ID]; !ok || !strings.Contains(l.Reason, want) || l.Attempt != 1 {
			t.Errorf("dead letter %s after attempt %d: %s", l.Message.ID, l.Attempt, l.Reason)
		}
	}
}

// TestDocumentation: the examples in the documentation are of today, and every
// field is there.
func TestDocumentation(t *testing.T) {
	b, err := os.ReadFile("../../../docs/messages.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, m := range regexp.MustCompile("(?ms)^```json (\\S+)\n(.*?)^```$").FindAllSubmatch(b, -1) {
		schema, body := string(m[1]), m[2]
		seen[schema]++
		if err := follows(t, compile(t, schema), body); err != nil {
			t.Errorf("%s: %v\n%s", schema, err, body)
		}
		msg := queue.Message{ContentType: "application/vnd.solstice." + schema + "+json", Body: body}
		var v any
		switch schema {
		case "runrequest.v1":
			v, err = messages.Decode[messages.RunRequest](msg)
		case "status.v1":
			v, err = messages.Decode[messages.Status](msg)
		case "wake.v1":
			v, err = messages.Decode[messages.Wake](msg)
		}
		if err != nil {
			t.Errorf("%s: %v\n%s", schema, err, body)
			continue
		}
		var again bytes.Buffer
		if err := json.NewEncoder(&again).Encode(v); err != nil {
			t.Fatal(err)
		}
		var have, want any
		if json.Unmarshal(body, &have) != nil || json.Unmarshal(again.Bytes(), &want) != nil || !reflect.DeepEqual(have, want) {
			t.Errorf("%s: an example has fields that nothing reads, or lacks some that are always written:\n%s%s", schema, body, again.Bytes())
		}
	}
	for _, schema := range []string{"runrequest.v1", "status.v1", "wake.v1"} {
		if seen[schema] == 0 {
			t.Errorf("no example of %s", schema)
		}
		doc, _ := schemaDoc(t, schema)
		for name := range doc["properties"].(map[string]any) {
			if !bytes.Contains(b, []byte("`"+name+"`")) {
				t.Errorf("%s: %s is not described", schema, name)
			}
		}
	}
}
