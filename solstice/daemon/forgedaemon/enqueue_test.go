package forgedaemon

import (
	"testing"

	"github.com/solstice-ci/solstice-go/solstice/daemon/forges"
)

// TestMatch: a remote of git is at the forge whose URL it has, by whatever protocol.
func TestMatch(t *testing.T) {
	all := []forges.Forge{
		{Name: "codeberg", URL: "https://codeberg.org"}, {Name: "lab", URL: "https://example.org:8443/gitlab/"}, {Name: "local"}, {Name: "other", URL: "https://example.org:9443"},
	}
	for remote, want := range map[string]string{
		"https://codeberg.org/acme/widget.git":              "codeberg acme/widget",
		"https://CODEBERG.org/acme/widget/":                 "codeberg acme/widget",
		"git@codeberg.org:acme/widget.git":                  "codeberg acme/widget",
		"ssh://git@codeberg.org:2222/acme/widget":           "codeberg acme/widget",
		"https://example.org:8443/gitlab/a/b/c.git":         "lab a/b/c",
		"https://example.org:9443/gitlabs/a":                "other gitlabs/a",
		"https://example.org:8443/gitlabs/a":                "",
		"https://example.org/gitlab/a/b":                    "",
		"https://codeberg.org.evil.example/acme/widget.git": "",
		"/srv/git/widget.git":                               "",
		"C:widget":                                          "",
		"":                                                  "",
	} {
		got := ""
		if f, repo, err := match(all, "", remote); err == nil {
			got = f.Name + " " + repo.FullName()
		}
		if got != want {
			t.Errorf("%s: %q, want %q", remote, got, want)
		}
	}
	if f, _, err := match(all, "other", "git@example.org:a/b.git"); err != nil || f.Name != "other" {
		t.Errorf("of two at one host: %s, %v", f.Name, err)
	}
}
