package agent_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

func TestParseVariables(t *testing.T) {
	type kvs = []workflow.KV
	for _, c := range []struct {
		in   string
		want kvs
	}{
		{"", nil},
		{"\n\r\n\n", nil},
		{"a=b", kvs{{Name: "a", Value: "b"}}},
		{"a=\nb==c=d\n", kvs{{Name: "a", Value: ""}, {Name: "b", Value: "=c=d"}}},
		{"a=x<<y\n", kvs{{Name: "a", Value: "x<<y"}}},
		{"a<<E\nE\n", kvs{{Name: "a", Value: ""}}},
		{"a<<E\n\nE\n", kvs{{Name: "a", Value: ""}}},
		{"a<<E\none\n two=2 \nEE\nE\nb=c", kvs{{Name: "a", Value: "one\n two=2 \nEE"}, {Name: "b", Value: "c"}}},
		{"a<<E=F\nx\nE=F", kvs{{Name: "a", Value: "x"}}},
		{"with-dash_1= spaces kept \n", kvs{{Name: "with-dash_1", Value: " spaces kept "}}},
		{"a=1\na=2", kvs{{Name: "a", Value: "1"}, {Name: "a", Value: "2"}}},
	} {
		got, err := agent.ParseVariables([]byte(c.in))
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%q: %v, %v, want %v", c.in, got, err, c.want)
		}
	}
	for in, want := range map[string]string{
		"nonsense":      "line 1",
		"a=b\nnonsense": "line 2",
		"=b":            "not a name",
		"1a=b":          "not a name",
		"a b=c":         "not a name",
		"-a=b":          "not a name",
		"a<<\nx\n":      "no delimiter",
		"a<<E\nx\ny\n":  "line 1",
		"a=\x00":        "not text",
		"a=\xff":        "not text",
		strings.Repeat("a=b\n", agent.MaxVariables/4+1): "larger",
	} {
		if _, err := agent.ParseVariables([]byte(in)); !errors.Is(err, agent.ErrVariables) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want it to say %q", in, err, want)
		}
	}
}

// FuzzParseVariables: what is accepted can be written again and means the same.
func FuzzParseVariables(f *testing.F) {
	for _, seed := range []string{"a=b\n", "a<<E\nx\nE\n", "a<<E\nx", "\r\n=", "a<<b=c\nb=c", "x=\xff", "é=1"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		vars, err := agent.ParseVariables(in)
		if err != nil {
			if !errors.Is(err, agent.ErrVariables) {
				t.Errorf("error %v", err)
			}
			return
		}
		var again strings.Builder
		for _, kv := range vars {
			delim := "E"
			for strings.Contains(kv.Value, delim) {
				delim += "E"
			}
			again.WriteString(kv.Name + "<<" + delim + "\n" + kv.Value + "\n" + delim + "\n")
		}
		if again.Len() > agent.MaxVariables {
			return
		}
		back, err := agent.ParseVariables([]byte(again.String()))
		if err != nil || !slices.Equal(back, vars) {
			t.Errorf("%q came back as %q, %v", vars, back, err)
		}
	})
}
