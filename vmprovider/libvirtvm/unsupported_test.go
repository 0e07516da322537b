//go:build !((libvirt || libvirt_dlopen) && cgo)

package libvirtvm

import (
	"errors"
	"strings"
	"testing"
)

// TestBuiltWithout: a program without libvirt says how to build one with.
func TestBuiltWithout(t *testing.T) {
	_, err := New(t.Context(), Config{URI: "qemu:///system", Accelerator: TCG, StoragePool: "p", Network: Network{Type: NetworkUser}})
	if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "-tags libvirt_dlopen") {
		t.Errorf("%v", err)
	}
}
