//go:build !((libvirt || libvirt_dlopen) && cgo)

package libvirtvm

import (
	"errors"
	"fmt"
)

func dial(string) (hypervisor, error) {
	return nil, fmt.Errorf("%w: this program is built without libvirt: build it with CGO_ENABLED=1 and -tags libvirt_dlopen, or -tags libvirt where libvirt's headers are installed", errors.ErrUnsupported)
}
