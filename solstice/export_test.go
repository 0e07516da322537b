package solstice

// SetProtocols changes the range of agent protocol versions that an engine
// speaks.
func SetProtocols(c *Config, lowest, highest int32) { c.protocols = protocols{lowest, highest} }
