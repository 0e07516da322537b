package agent

// Parts of the package that its tests reach into.

// SetSourceTries says how often a checkout tries to reach the source.
func (c *Config) SetSourceTries(n int) { c.sourceTries = n }

// SetSpoolMemory says how many bytes of the journal are kept in memory.
func (c *Config) SetSpoolMemory(n int) { c.spoolMemory = n }

// Untar and ErrInfra are how a source archive is unpacked, and how its failures
// are told apart.
var (
	Untar   = untar
	IsInfra = isInfra
)

// SetFailpoint has f called where goroutines of an agent begin.
func (c *Config) SetFailpoint(f func(at string)) { c.failpoint = f }
