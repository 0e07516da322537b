//go:build !linux

package libvirtvm

import (
	"errors"
	"fmt"
	"net/netip"
)

type kernel struct{}

func (kernel) apply(*Isolation) error {
	return fmt.Errorf("%w: isolation needs Linux", errors.ErrUnsupported)
}
func (kernel) intact(*Isolation) bool                { return true }
func (kernel) remove(string) error                   { return nil }
func (kernel) addresses(string) ([]netip.Addr, bool) { return nil, false }
