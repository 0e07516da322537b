package solstice

import (
	"sync"

	"google.golang.org/grpc"

	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
)

// serveLocal answers the agents inside this process, which share a connection
// and are known by their credentials, as all are.
func (e *Engine) serveLocal(options ...grpc.ServerOption) (stop func()) {
	if e.cfg.LocalAgents == nil {
		return func() {}
	}
	g := grpc.NewServer(options...)
	agentv1.RegisterAgentServiceServer(g, &agentService{e: e})
	var wg sync.WaitGroup
	wg.Go(func() { _ = g.Serve(e.cfg.LocalAgents) })
	return func() {
		g.Stop()
		wg.Wait()
	}
}
