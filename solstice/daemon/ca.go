package daemon

import (
	"github.com/solstice-ci/solstice-go/internal/selfca"
	"github.com/solstice-ci/solstice-go/solstice/agent"
)

// CA is a certificate authority of a program's own, for the agent endpoint:
// PEM is what agents are given, ServerConfig what the endpoint serves with.
type CA struct{ *selfca.CA }

// LoadOrCreateCA returns the authority kept in dir/ca.pem (mode 0600: key and
// certificate), made when it is not there; several processes may do so at once
// and get the same one. The server certificate is for agent.ServerName and
// hosts, names or IP addresses; it lives in memory and is replaced in time.
func LoadOrCreateCA(dir string, hosts ...string) (*CA, error) {
	ca, err := selfca.LoadOrCreate(dir, append([]string{agent.ServerName}, hosts...)...)
	if err != nil {
		return nil, err
	}
	return &CA{ca}, nil
}
