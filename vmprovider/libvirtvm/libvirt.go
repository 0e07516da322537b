//go:build (libvirt || libvirt_dlopen) && cgo

package libvirtvm

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"libvirt.org/go/libvirt"
)

// A libvirtd that says nothing for keepAliveSeconds * keepAliveCount is lost.
const (
	keepAliveSeconds = 5
	keepAliveCount   = 3
)

// concurrent calls are made over a connection at most: where as many wait for an
// answer as libvirtd allows (max_client_requests, 5), it reads nothing more from
// it, keepalives neither, and the connection counts as lost. What is on its way in an
// upload counts as well.
const concurrent = 3

// events runs libvirt's event loop, of which a process has one, for ever.
var events = sync.OnceValue(func() error {
	if err := libvirt.EventRegisterDefaultImpl(); err != nil {
		return err
	}
	go func() {
		for libvirt.EventRunDefaultImpl() == nil {
		}
	}()
	return nil
})

// connection is libvirt's, call by call.
type connection struct {
	c    *libvirt.Connect
	lost chan struct{}
	once sync.Once
	// calls is held, for reading, by each call: one may go on after nobody waits
	// for it any more, and libvirt must not lose the connection under it.
	calls  sync.RWMutex
	closed bool
	slots  chan struct{}
}

func dial(uri string) (hypervisor, error) {
	if err := events(); err != nil {
		return nil, named(err)
	}
	c, err := libvirt.NewConnect(uri)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errLost, err)
	}
	h := &connection{c: c, lost: make(chan struct{}), slots: make(chan struct{}, concurrent)}
	if err := c.RegisterCloseCallback(func(*libvirt.Connect, libvirt.ConnectCloseReason) { h.once.Do(func() { close(h.lost) }) }); err != nil && !unsupported(err) {
		h.Close()
		return nil, named(err)
	}
	if err := c.SetKeepAlive(keepAliveSeconds, keepAliveCount); err != nil && !unsupported(err) {
		h.Close()
		return nil, named(err)
	}
	return h, nil
}

// named gives libvirt's errors the names that the driver knows them by.
func named(err error) error {
	var e libvirt.Error
	if !errors.As(err, &e) {
		return err
	}
	kind := map[libvirt.ErrorNumber]error{
		libvirt.ERR_NO_DOMAIN:         errNoDomain,
		libvirt.ERR_NO_STORAGE_VOL:    errNoVolume,
		libvirt.ERR_NO_STORAGE_POOL:   errNoPool,
		libvirt.ERR_NO_NETWORK:        errNoNetwork,
		libvirt.ERR_NETWORK_EXIST:     errExists,
		libvirt.ERR_STORAGE_VOL_EXIST: errExists,
		libvirt.ERR_DOM_EXIST:         errExists,
		libvirt.ERR_INVALID_CONN:      errLost,
		libvirt.ERR_RPC:               errLost,
	}[e.Code]
	switch {
	case kind != nil:
	case strings.Contains(e.Message, "No space left on device"):
		kind = errNoSpace
	case e.Domain == libvirt.FROM_STORAGE && (strings.Contains(e.Message, "still in use") || strings.Contains(e.Message, "asynchronous jobs running")):
		kind = errBusy
	case e.Domain == libvirt.FROM_RPC && e.Code == libvirt.ERR_INTERNAL_ERROR: // as "client socket is closed"
		kind = errLost
	default:
		return err
	}
	return fmt.Errorf("%w: %w", kind, err)
}

func code(err error) libvirt.ErrorNumber {
	var e libvirt.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return libvirt.ERR_OK
}

func unsupported(err error) bool { return code(err) == libvirt.ERR_NO_SUPPORT }

func (h *connection) Lost() <-chan struct{} { return h.lost }

// Close closes the connection when the last call has returned.
func (h *connection) Close() {
	go func() {
		h.calls.Lock()
		defer h.calls.Unlock()
		_, _ = h.c.Close() // nothing is to be done about it
		h.closed = true
	}()
}

// enter is the start of each call, leave its end.
func (h *connection) enter() error {
	h.slots <- struct{}{}
	h.calls.RLock()
	if h.closed {
		h.leave()
		return errLost
	}
	return nil
}

func (h *connection) leave() {
	h.calls.RUnlock()
	<-h.slots
}

func (h *connection) Hostname() (string, error) {
	if err := h.enter(); err != nil {
		return "", err
	}
	defer h.leave()
	name, err := h.c.GetHostname()
	return name, named(err)
}

func (h *connection) DefineDomain(xml string) error {
	if err := h.enter(); err != nil {
		return err
	}
	defer h.leave()
	d, err := h.c.DomainDefineXMLFlags(xml, 0)
	if code(err) == libvirt.ERR_OPERATION_FAILED && strings.Contains(err.Error(), "already exists with uuid") {
		return fmt.Errorf("%w: %w", errExists, err)
	}
	if err != nil {
		return named(err)
	}
	return named(d.Free())
}

// with calls f on a domain.
func (h *connection) with(name string, f func(d *libvirt.Domain) error) error {
	if err := h.enter(); err != nil {
		return err
	}
	defer h.leave()
	d, err := h.c.LookupDomainByName(name)
	if err != nil {
		return named(err)
	}
	defer func() { _ = d.Free() }()
	return named(f(d))
}

func (h *connection) StartDomain(name string) error {
	return h.with(name, func(d *libvirt.Domain) error { return d.Create() })
}

func (h *connection) StopDomain(name string) error {
	return h.with(name, func(d *libvirt.Domain) error {
		err := d.Destroy()
		if code(err) == libvirt.ERR_OPERATION_INVALID {
			return errNotRunning
		}
		return err
	})
}

func (h *connection) UndefineDomain(name string) error {
	return h.with(name, func(d *libvirt.Domain) error {
		err := d.UndefineFlags(libvirt.DOMAIN_UNDEFINE_NVRAM | libvirt.DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
		if unsupported(err) || code(err) == libvirt.ERR_INVALID_ARG {
			return d.Undefine()
		}
		return err
	})
}

func (h *connection) SetMetadata(name, namespace, xml string) error {
	return h.with(name, func(d *libvirt.Domain) error {
		return d.SetMetadata(libvirt.DOMAIN_METADATA_ELEMENT, xml, "solstice", namespace, libvirt.DOMAIN_AFFECT_CONFIG)
	})
}

func (h *connection) Domain(name string) (found domain, err error) {
	err = h.with(name, func(d *libvirt.Domain) error {
		found, err = snapshot(d)
		return err
	})
	return found, err
}

func (h *connection) Domains() ([]domain, error) {
	if err := h.enter(); err != nil {
		return nil, err
	}
	defer h.leave()
	all, err := h.c.ListAllDomains(0)
	if err != nil {
		return nil, named(err)
	}
	var found []domain
	for i := range all {
		d, serr := snapshot(&all[i])
		_ = all[i].Free()
		if code(serr) == libvirt.ERR_NO_DOMAIN {
			continue // undefined meanwhile
		}
		err = errors.Join(err, named(serr))
		found = append(found, d)
	}
	return found, err
}

func snapshot(d *libvirt.Domain) (domain, error) {
	text, err := d.GetXMLDesc(libvirt.DOMAIN_XML_INACTIVE)
	if err != nil {
		return domain{}, err
	}
	state, reason, err := d.GetState()
	if err != nil {
		return domain{}, err
	}
	switch state {
	case libvirt.DOMAIN_SHUTOFF:
		return domain{XML: text, Reason: map[libvirt.DomainShutoffReason]string{
			libvirt.DOMAIN_SHUTOFF_SHUTDOWN:  "the guest powered off",
			libvirt.DOMAIN_SHUTOFF_DESTROYED: "it was stopped",
			libvirt.DOMAIN_SHUTOFF_CRASHED:   "the guest panicked, or QEMU crashed",
			libvirt.DOMAIN_SHUTOFF_FAILED:    "it could not be started, or QEMU ended",
			libvirt.DOMAIN_SHUTOFF_DAEMON:    "libvirtd could not go on with it",
		}[libvirt.DomainShutoffReason(reason)]}, nil
	case libvirt.DOMAIN_CRASHED:
		return domain{XML: text, Reason: "the guest crashed"}, nil
	default:
		return domain{XML: text, Active: true}, nil
	}
}

// in calls f on a storage pool.
func (h *connection) in(pool string, f func(p *libvirt.StoragePool) error) error {
	if err := h.enter(); err != nil {
		return err
	}
	defer h.leave()
	p, err := h.c.LookupStoragePoolByName(pool)
	if err != nil {
		return named(err)
	}
	defer func() { _ = p.Free() }()
	return named(f(p))
}

// on calls f on a volume.
func (h *connection) on(pool, volume string, f func(v *libvirt.StorageVol) error) error {
	return h.in(pool, func(p *libvirt.StoragePool) error {
		v, err := p.LookupStorageVolByName(volume)
		if err != nil {
			return err
		}
		defer func() { _ = v.Free() }()
		return f(v)
	})
}

func (h *connection) PoolXML(pool string) (text string, err error) {
	err = h.in(pool, func(p *libvirt.StoragePool) error {
		text, err = p.GetXMLDesc(0)
		return err
	})
	return text, err
}

func (h *connection) RefreshPool(pool string) error {
	return h.in(pool, func(p *libvirt.StoragePool) error { return p.Refresh(0) })
}

func (h *connection) CreateVolume(pool, xml string) error {
	return h.in(pool, func(p *libvirt.StoragePool) error {
		v, err := p.StorageVolCreateXML(xml, 0)
		if err != nil {
			return err
		}
		return v.Free()
	})
}

func (h *connection) Upload(pool, volume string, content []byte) error {
	return h.stream(pool, volume, func(v *libvirt.StorageVol, s *libvirt.Stream) error {
		if err := v.Upload(s, 0, uint64(len(content)), 0); err != nil {
			return err
		}
		return s.SendAll(func(_ *libvirt.Stream, n int) ([]byte, error) {
			n = min(n, len(content))
			piece := content[:n]
			content = content[n:]
			return piece, nil
		})
	})
}

func (h *connection) Download(pool, volume string, offset, length int64, w io.Writer) error {
	return h.stream(pool, volume, func(v *libvirt.StorageVol, s *libvirt.Stream) error {
		if err := v.Download(s, uint64(offset), uint64(length), 0); err != nil { //nolint:gosec // not negative
			return err
		}
		return s.RecvAll(func(_ *libvirt.Stream, b []byte) (int, error) { return w.Write(b) })
	})
}

// stream calls f with a stream, which ends well where f does.
func (h *connection) stream(pool, volume string, f func(v *libvirt.StorageVol, s *libvirt.Stream) error) error {
	return h.on(pool, volume, func(v *libvirt.StorageVol) error {
		s, err := h.c.NewStream(0)
		if err != nil {
			return err
		}
		defer func() { _ = s.Free() }()
		if err := f(v, s); err != nil {
			_ = s.Abort() // one that did not begin, or that has failed
			return err
		}
		return s.Finish()
	})
}

func (h *connection) DeleteVolume(pool, volume string) error {
	return h.on(pool, volume, func(v *libvirt.StorageVol) error { return v.Delete(0) })
}

func (h *connection) Volumes(pool string) (names []string, err error) {
	err = h.in(pool, func(p *libvirt.StoragePool) error {
		names, err = p.ListStorageVolumes()
		return err
	})
	return names, err
}

// network calls f on a network.
func (h *connection) network(name string, f func(n *libvirt.Network) error) error {
	if err := h.enter(); err != nil {
		return err
	}
	defer h.leave()
	n, err := h.c.LookupNetworkByName(name)
	if err != nil {
		return named(err)
	}
	defer func() { _ = n.Free() }()
	return named(f(n))
}

func (h *connection) Network(name string) (uuid string, err error) {
	err = h.network(name, func(n *libvirt.Network) error {
		uuid, err = n.GetUUIDString()
		return err
	})
	return uuid, err
}

func (h *connection) StartNetwork(xml string) error {
	if err := h.enter(); err != nil {
		return err
	}
	defer h.leave()
	n, err := h.c.NetworkCreateXML(xml)
	if code(err) == libvirt.ERR_OPERATION_INVALID && strings.Contains(err.Error(), "already active") {
		return fmt.Errorf("%w: %w", errExists, err) // another process was faster
	}
	if err != nil {
		return named(err)
	}
	return n.Free()
}

func (h *connection) StopNetwork(name string) error {
	return h.network(name, func(n *libvirt.Network) error { return n.Destroy() })
}

func (h *connection) Changes(f func(name string)) error {
	if err := h.enter(); err != nil {
		return err
	}
	defer h.leave()
	_, err := h.c.DomainEventLifecycleRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, _ *libvirt.DomainEventLifecycle) {
		if name, err := d.GetName(); err == nil {
			f(name)
		}
	})
	return named(err)
}
