package solstice

import "github.com/solstice-ci/solstice-go/internal/store"

// SetProtocols changes the range of agent protocol versions that an engine
// speaks.
func SetProtocols(c *Config, lowest, highest int32) { c.protocols = protocols{lowest, highest} }

// SetClock replaces the clock of an engine's state.
func SetClock(c *Config, clock store.Clock) { c.clock = clock }
