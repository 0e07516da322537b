package testenv

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"
)

// Proxy stands between a client and a server and makes the faults of a network
// (https://github.com/Shopify/toxiproxy#toxics). It stops when the test ends.
type Proxy struct {
	proxy *toxiproxy.Proxy
}

// NewProxy forwards connections to the address upstream, which may come up
// later.
func NewProxy(t testing.TB, upstream string) *Proxy {
	t.Helper()
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	p := &Proxy{toxiproxy.NewProxy(server, t.Name(), "127.0.0.1:0", upstream)}
	p.Restore(t)
	t.Cleanup(p.proxy.Stop)
	return p
}

// Addr is where the proxy listens, also after Cut and Restore.
func (p *Proxy) Addr() string { return p.proxy.Listen }

// Cut breaks all connections and refuses new ones.
func (p *Proxy) Cut() { p.proxy.Stop() }

// Restore ends a Cut.
func (p *Proxy) Restore(t testing.TB) {
	t.Helper()
	if err := p.proxy.Start(); err != nil {
		t.Fatalf("start a proxy: %v", err)
	}
}

// Direction of the bytes that a toxic touches.
type Direction string

// Directions.
const (
	ToServer Direction = "upstream"
	ToClient Direction = "downstream"
)

// Add adds a toxic of a kind (latency, bandwidth, timeout, reset_peer,
// limit_data, slicer, …) to all connections, those that are open too.
// Attributes are the kind's own.
func (p *Proxy) Add(t testing.TB, kind string, d Direction, attributes map[string]any) (remove func()) {
	t.Helper()
	name := kind + "-" + string(d)
	toxic, err := json.Marshal(map[string]any{"name": name, "type": kind, "stream": d, "attributes": attributes})
	if err == nil {
		_, err = p.proxy.Toxics.AddToxicJson(strings.NewReader(string(toxic)))
	}
	if err != nil {
		t.Fatalf("add the toxic %s: %v", kind, err)
	}
	return func() {
		t.Helper()
		if err := p.proxy.Toxics.RemoveToxic(t.Context(), name); err != nil {
			t.Errorf("remove the toxic %s: %v", kind, err)
		}
	}
}
