// Package messages is what the parts of Solstice, and programs of others, say to
// each other through a queue: run requests, commit statuses and wake-ups. For
// each there is a Go type and a JSON Schema. docs/messages.md describes them for
// programs in other languages.
//
// A message names its schema, such as runrequest.v1, in the attribute
// solstice-schema and in its content type. Within a major version fields are only
// ever added, so readers ignore what they do not know; a reader refuses a major
// version that it does not know. [Handler] has what cannot be read put to the
// dead letters, with the reason.
package messages

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"mime"
	"strconv"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/queue"
)

// Topics of the messages. A status goes to [StatusTopic].
const (
	TopicRunRequest = "runrequest"
	TopicWake       = "wake"
)

// StatusTopic is the topic of the statuses for a forge instance, status.NAME, so
// that each is read by who holds that forge's credentials.
func StatusTopic(forge string) string { return "status." + forge }

// Group is the group of competing readers, engines or forge integrations, of run
// requests and statuses. Wake-ups are broadcast.
const Group = "solstice"

// AttributeSchema is the attribute, or header, that names a message's schema.
const AttributeSchema = "solstice-schema"

// Errors of Encode and Decode.
var (
	// ErrSchema: the message says that it is another one, or does not say
	// what it is, or contradicts itself.
	ErrSchema = errors.New("messages: not the expected schema")
	// ErrVersion: it is of a major version that this program does not know.
	ErrVersion = errors.New("messages: unknown major version")
	// ErrBody: its body is not JSON of that schema: a required field is missing,
	// or a field has a value that it cannot have.
	ErrBody = errors.New("messages: body does not follow the schema")
)

// RunRequest asks for the workflows of a commit to be run.
type RunRequest struct {
	// Forge is the name of a configured forge instance; empty where there is
	// only one.
	Forge string     `json:"forge,omitempty"`
	Repo  forge.Repo `json:"repo"`
	// Commit is the full object name; empty: what Ref is now.
	Commit string `json:"commit,omitempty"`
	Ref    string `json:"ref,omitempty"` // full: refs/heads/main
	// Event is why; its zero value is a manual start. Commit, Ref and Repo above
	// win over the event's own.
	Event forge.Event `json:"event,omitzero"`
	// Inputs of a manual start, as given by a person.
	Inputs map[string]string `json:"inputs,omitempty"`
	// Workflow selects one file by path or name; it then runs whatever it
	// says under on. Empty: all that the event concerns.
	Workflow string `json:"workflow,omitempty"`
	// Jobs selects jobs by id, and what they need; empty: all.
	Jobs []string `json:"jobs,omitempty"`
	// IdempotencyKey makes a repeat return the runs of the first time. Events
	// with a Delivery are deduplicated by that as well. Of a message with
	// neither, the message's ID is the key.
	IdempotencyKey string `json:"idempotency_key,omitempty"`
	Priority       int    `json:"priority,omitempty"` // higher first
	// AwaitApproval, where not empty, has the runs wait until they are approved;
	// it says why, for people.
	AwaitApproval string `json:"await_approval,omitempty"`
}

// Status asks the holder of a forge's credentials to report a status.
type Status struct {
	Forge  string       `json:"forge"`
	Repo   forge.Repo   `json:"repo"`
	Commit string       `json:"commit"`
	Status forge.Status `json:"status"`
}

// Wake says that there may be work for labels.
type Wake struct {
	From string `json:"from"` // the orchestrator; it ignores its own
	// Labels are those that jobs ask for with runs-on; none: From is there.
	Labels []string `json:"labels,omitempty"`
}

// Schema is runrequest.v1.
func (RunRequest) Schema() string { return "runrequest.v1" }

// Schema is status.v1.
func (Status) Schema() string { return "status.v1" }

// Schema is wake.v1.
func (Wake) Schema() string { return "wake.v1" }

// Validate reports what is missing, or what no repository can be called. It
// wraps ErrBody.
func (r RunRequest) Validate() error { return validRepo(r.Repo) }

// Validate reports what is missing, and what [forge.Status.Validate] does. It
// wraps ErrBody.
func (s Status) Validate() error {
	switch {
	case s.Forge == "":
		return fmt.Errorf("%w: forge is missing", ErrBody)
	case s.Commit == "":
		return fmt.Errorf("%w: commit is missing", ErrBody)
	}
	if err := validRepo(s.Repo); err != nil {
		return err
	}
	if err := s.Status.Validate(); err != nil {
		return fmt.Errorf("%w: status: %w", ErrBody, err)
	}
	return nil
}

// Validate reports what is missing. It wraps ErrBody.
func (w Wake) Validate() error {
	if w.From == "" {
		return fmt.Errorf("%w: from is missing", ErrBody)
	}
	return nil
}

func validRepo(r forge.Repo) error {
	if r.Name == "" {
		return fmt.Errorf("%w: repo.name is missing", ErrBody)
	}
	if err := r.Validate(); err != nil {
		return fmt.Errorf("%w: repo: %w", ErrBody, err)
	}
	return nil
}

// Body is the type of a message's body.
type Body interface {
	RunRequest | Status | Wake
	Schema() string
	Validate() error
}

// contentType of a schema.
func contentType(schema string) string { return typePrefix + schema + typeSuffix }

const (
	typePrefix = "application/vnd.solstice."
	typeSuffix = "+json"
)

// Encode makes a message, with content type and schema. Its error wraps ErrBody.
func Encode[T Body](body T) (queue.Message, error) {
	if err := body.Validate(); err != nil {
		return queue.Message{}, err
	}
	b, err := json.Marshal(body)
	if err != nil { // a time beyond the year 9999
		return queue.Message{}, fmt.Errorf("%w: %w", ErrBody, err)
	}
	schema := body.Schema()
	return queue.Message{Body: b, ContentType: contentType(schema), Attributes: map[string]string{AttributeSchema: schema}}, nil
}

// Decode reads a message of the schema that T has. Its error wraps ErrSchema,
// ErrVersion or ErrBody.
func Decode[T Body](m queue.Message) (T, error) {
	var body, none T
	if err := expect(body.Schema(), m); err != nil {
		return none, err
	}
	if err := json.Unmarshal(m.Body, &body); err != nil {
		return none, fmt.Errorf("%w: %w", ErrBody, err)
	}
	if err := body.Validate(); err != nil {
		return none, err
	}
	return body, nil
}

// Handler is a handler for [queue.Consumer] that decodes. What cannot be read
// now never can, so it is discarded to the dead letters.
func Handler[T Body](handle func(ctx context.Context, m queue.Message, body T) error) func(context.Context, queue.Message) error {
	return func(ctx context.Context, m queue.Message) error {
		body, err := Decode[T](m)
		if err != nil {
			return queue.Discard(err)
		}
		return handle(ctx, m, body)
	}
}

// expect compares what a message says it is with a schema. The attribute
// decides; without it the content type does.
func expect(want string, m queue.Message) error {
	attribute := m.Attributes[AttributeSchema]
	typed := ofContentType(m.ContentType)
	got := attribute
	switch {
	case attribute == "" && typed == "":
		return fmt.Errorf("%w: neither %s nor the content type says which; want %s", ErrSchema, AttributeSchema, want)
	case attribute == "":
		got = typed
	case typed != "" && typed != attribute:
		return fmt.Errorf("%w: %s is %q, but the content type is %q", ErrSchema, AttributeSchema, attribute, m.ContentType)
	}
	if got == want {
		return nil
	}
	name, _, _ := strings.Cut(want, ".v")
	if version, ok := strings.CutPrefix(got, name+".v"); ok {
		if _, err := strconv.ParseUint(version, 10, 64); err == nil {
			return fmt.Errorf("%w: %q; this program reads %s", ErrVersion, got, want)
		}
	}
	return fmt.Errorf("%w: it is %q; want %s", ErrSchema, got, want)
}

// ofContentType is the schema that a content type names, empty if none.
func ofContentType(s string) string {
	t, _, err := mime.ParseMediaType(s)
	if err != nil {
		return ""
	}
	if t, ok := strings.CutPrefix(t, typePrefix); ok {
		if schema, ok := strings.CutSuffix(t, typeSuffix); ok {
			return schema
		}
	}
	return ""
}

//go:embed *.schema.json
var schemas embed.FS

// Schemas has a JSON Schema (draft 2020-12, https://json-schema.org/draft/2020-12)
// for each message's body, by the name SCHEMA.schema.json, such as
// runrequest.v1.schema.json.
func Schemas() fs.FS { return schemas }
