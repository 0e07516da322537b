package libvirtvm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"libvirt.org/go/libvirtxml"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// Isolation is a network in which a machine reaches what is listed, and nothing
// else: not the host, not what is beyond it, and no other machine. It has a
// bridge of its own, which the provider makes and removes together with the
// rules of nftables that guard it; both are there before a packet passes.
//
// It needs a qemu:///system of this host, in this process's network namespace,
// and CAP_NET_ADMIN.
type Isolation struct {
	// Bridge is the name of the bridge and of libvirt's network, at most 15
	// characters long; required. No other pool has the same.
	Bridge string
	// Subnet is for the machines, IPv4, with 22 to 29 bits; its first address is
	// the host's. Required.
	Subnet netip.Prefix
	// Allow lists what machines reach. Nothing is implied: neither the endpoint of
	// the agents nor name servers, though those that are listed (udp, port 53)
	// are announced to the guests.
	Allow []Allowed
}

// Protocol is one of the transport layer.
type Protocol string

// Protocols.
const (
	TCP Protocol = "tcp"
	UDP Protocol = "udp"
)

// Allowed is what a machine may reach. Its text is PROTOCOL/ADDRESS:PORT or
// PROTOCOL/NET/BITS:PORT, as in tcp/10.0.0.5:5432, udp/192.0.2.0/24:53 and
// tcp/[2001:db8::]/32:443.
type Allowed struct {
	Protocol Protocol
	// To is an address or a net. A net does not include the addresses of the host
	// itself, link-local ones (where cloud providers keep their metadata) and those
	// of other machines, even where they lie in it: the first two are listed one by
	// one if they are meant.
	To   netip.Prefix
	Port uint16
}

// String gives the text.
func (a Allowed) String() string {
	to := a.To.Addr().String()
	if a.To.Addr().Is6() {
		to = "[" + to + "]"
	}
	if !a.To.IsSingleIP() {
		to += "/" + strconv.Itoa(a.To.Bits())
	}
	return string(a.Protocol) + "/" + to + ":" + strconv.Itoa(int(a.Port))
}

// MarshalText implements encoding.TextMarshaler.
func (a Allowed) MarshalText() ([]byte, error) { return []byte(a.String()), a.check() }

// UnmarshalText implements encoding.TextUnmarshaler.
func (a *Allowed) UnmarshalText(text []byte) error {
	parsed, err := parseAllowed(string(text))
	if err != nil {
		return fmt.Errorf("%q: %w; want one like tcp/10.0.0.5:5432, udp/192.0.2.0/24:53 or tcp/[2001:db8::]/32:443", text, err)
	}
	*a = parsed
	return nil
}

func parseAllowed(text string) (a Allowed, err error) {
	protocol, rest, _ := strings.Cut(text, "/")
	colon := strings.LastIndexByte(rest, ':')
	if colon < 0 || strings.HasSuffix(rest, "]") {
		return a, errors.New("there is no port")
	}
	to, portText := rest[:colon], rest[colon+1:]
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil || strconv.FormatUint(port, 10) != portText {
		return a, fmt.Errorf("port %q is not a number from 1 to 65535", portText)
	}
	addrText, bits := to, ""
	if in, ok := strings.CutPrefix(to, "["); ok {
		if addrText, bits, ok = strings.Cut(in, "]"); !ok {
			return a, errors.New("a bracket is not closed")
		}
	} else if slash := strings.IndexByte(to, '/'); slash >= 0 {
		addrText, bits = to[:slash], to[slash:]
	}
	addr, err := netip.ParseAddr(addrText)
	if err != nil {
		return a, fmt.Errorf("%q is not an address", addrText)
	}
	if addr.Zone() != "" {
		return a, fmt.Errorf("%s has a zone", addr)
	}
	if addr.Is6() != strings.HasPrefix(to, "[") {
		return a, errors.New("brackets are for IPv6 addresses, and those need them")
	}
	a = Allowed{Protocol: Protocol(protocol), To: netip.PrefixFrom(addr, addr.BitLen()), Port: uint16(port)}
	if bits != "" {
		if a.To, err = netip.ParsePrefix(addrText + bits); err != nil {
			return a, fmt.Errorf("%q is not the length of a net", bits)
		}
	}
	return a, a.check()
}

func (a Allowed) check() error {
	switch addr := a.To.Addr(); {
	case a.Protocol != TCP && a.Protocol != UDP:
		return fmt.Errorf("protocol %q is neither tcp nor udp", a.Protocol)
	case !a.To.IsValid():
		return errors.New("there is no address")
	case addr.Is4In6():
		return fmt.Errorf("%s: want IPv4 written as such", addr)
	case a.To != a.To.Masked():
		return fmt.Errorf("%s is not the beginning of its net %s", addr, a.To.Masked())
	case a.Port == 0:
		return errors.New("port 0 is none")
	}
	return nil
}

// guardEvery is how long machines run at most without rules that were flushed.
const guardEvery = 5 * time.Second

const (
	leastBits, mostBits = 22, 29 // of the subnet: 1021 machines to 5
)

var bridgeForm = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_-]{0,14}$`)

// checkIsolation is part of complete.
func (c Config) checkIsolation() error {
	i := c.Isolation
	if u, err := url.Parse(c.URI); err != nil || u.Scheme != "qemu" && u.Scheme != "qemu+unix" || u.Host != "" || u.Path != "/system" {
		return invalid("isolation with URI %q: want qemu:///system: the bridge and its rules are made on this host, by its system libvirtd", c.URI)
	}
	if c.Network != (Network{}) {
		return invalid("isolation makes the network: leave network out")
	}
	if !bridgeForm.MatchString(i.Bridge) {
		return invalid("isolation: bridge %q: want a name of at most 15 letters, digits, _ and -", i.Bridge)
	}
	if !i.Subnet.Addr().Is4() || i.Subnet != i.Subnet.Masked() || i.Subnet.Bits() < leastBits || i.Subnet.Bits() > mostBits {
		return invalid("isolation: subnet %s: want one of IPv4 with %d to %d bits, as in 10.99.0.0/24", i.Subnet, leastBits, mostBits)
	}
	for _, a := range i.Allow {
		switch err := a.check(); {
		case err != nil:
			return invalid("isolation: allow %s: %v", a, err)
		case a.To.Addr().Is6():
			return invalid("isolation: allow %s: machines have IPv4 only", a)
		case a.To.Addr().IsLoopback() || a.To.Addr().IsMulticast():
			return invalid("isolation: allow %s: no machine reaches a loopback or multicast address", a)
		case a.To.IsSingleIP() && i.Subnet.Contains(a.To.Addr()) && a.To.Addr() != i.host():
			return invalid("isolation: allow %s: it is in the machines' subnet, where %s is the host", a, i.host())
		}
	}
	if c.Domain != "" {
		var d libvirtxml.Domain
		if err := c.overlay(&d); err == nil && d.Devices != nil && len(d.Devices.Interfaces) > 0 {
			return invalid("domain: with isolation a machine has no other interface")
		}
	}
	return nil
}

// host is the host's address.
func (i *Isolation) host() netip.Addr { return i.Subnet.Addr().Next() }

// place is a machine's in the network. Port, MAC and address belong to each
// other, and no frame passes in which they differ.
type place struct {
	addr netip.Addr
	port string // name of the host's end of the machine's interface
	mac  net.HardwareAddr
}

func placeOf(addr netip.Addr) place {
	b := addr.As4()
	return place{addr, "sol" + hex.EncodeToString(b[:]), append(net.HardwareAddr{0x52, 0x54}, b[:]...)}
}

// places are all there are.
func (i *Isolation) places() []place {
	var all []place
	for addr := i.host().Next(); i.Subnet.Contains(addr.Next()); addr = addr.Next() { // the last is for broadcast
		all = append(all, placeOf(addr))
	}
	return all
}

// seat gives a machine any of the free places: two processes hardly choose the
// same, and where they do, the kernel gives the port to one of them.
func (p *Provider) seat(ctx context.Context, h hypervisor, c *creation) (place, error) {
	unlock, err := p.locks.Lock(ctx, networkLock)
	if err != nil {
		return place{}, context.Cause(ctx)
	}
	defer unlock()
	taken := map[string]bool{}
	p.mu.Lock()
	for _, other := range p.creating { // before the domains: it is among them when it is no more among these
		taken[other.place.mac.String()] = true
	}
	p.mu.Unlock()
	domains, err := call(ctx, h.Domains)
	if err != nil {
		return place{}, err
	}
	for _, d := range domains {
		for _, nic := range interfaces(d.XML, p.cfg.Isolation.Bridge) {
			taken[nic.MAC.Address] = true
		}
	}
	free := slices.DeleteFunc(p.cfg.Isolation.places(), func(at place) bool { return taken[at.mac.String()] })
	if len(free) == 0 {
		return place{}, fmt.Errorf("%w: all addresses of %s are taken", vmprovider.ErrCapacity, p.cfg.Isolation.Subnet)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	c.place = free[rand.IntN(len(free))] //nolint:gosec // no secret
	return c.place, nil
}

// interfaces are those of a domain that are in a network.
func interfaces(domainXML, network string) (in []libvirtxml.DomainInterface) {
	var d libvirtxml.Domain
	if err := d.Unmarshal(domainXML); err != nil || d.Devices == nil {
		return nil
	}
	for _, nic := range d.Devices.Interfaces {
		if nic.MAC != nil && nic.Source != nil && nic.Source.Network != nil && nic.Source.Network.Network == network {
			in = append(in, nic)
		}
	}
	return in
}

// nic connects a machine.
func (i *Isolation) nic(at place) libvirtxml.DomainInterface {
	return libvirtxml.DomainInterface{
		MAC:         &libvirtxml.DomainInterfaceMAC{Address: at.mac.String()},
		Source:      &libvirtxml.DomainInterfaceSource{Network: &libvirtxml.DomainInterfaceSourceNetwork{Network: i.Bridge}},
		Target:      &libvirtxml.DomainInterfaceTarget{Dev: at.port},
		Model:       &libvirtxml.DomainInterfaceModel{Type: "virtio"},
		PortOptions: &libvirtxml.DomainInterfacePortOptions{Isolated: "yes"},
	}
}

// network is libvirt's, to which it adds no rules of its own. Every address is
// bound to its MAC, and there is no name server.
func (i *Isolation) network() (name, id, text string, err error) {
	n := libvirtxml.Network{
		Name:    i.Bridge,
		Forward: &libvirtxml.NetworkForward{Mode: "open"},
		Bridge:  &libvirtxml.NetworkBridge{Name: i.Bridge, STP: "off", Delay: "0"},
		DNS:     &libvirtxml.NetworkDNS{Enable: "no"},
	}
	dhcp := &libvirtxml.NetworkDHCP{}
	for _, p := range i.places() {
		dhcp.Hosts = append(dhcp.Hosts, libvirtxml.NetworkDHCPHost{MAC: p.mac.String(), IP: p.addr.String()})
	}
	n.IPs = []libvirtxml.NetworkIP{{Address: i.host().String(), Prefix: uint(i.Subnet.Bits()), DHCP: dhcp}} //nolint:gosec // not negative
	var servers []string
	for _, a := range i.Allow {
		if a.Protocol == UDP && a.Port == 53 && a.To.IsSingleIP() {
			servers = append(servers, a.To.Addr().String())
		}
	}
	if len(servers) > 0 {
		n.DnsmasqOptions = &libvirtxml.NetworkDnsmasqOptions{Option: []libvirtxml.NetworkDnsmasqOption{
			{Value: "dhcp-option=option:dns-server," + strings.Join(servers, ",")},
		}}
	}
	if text, err = n.Marshal(); err != nil {
		return "", "", "", err
	}
	n.UUID = networkID(i.Bridge, text)
	text, err = n.Marshal()
	return i.Bridge, n.UUID, text, err
}

// networkID says whose a network is, with its first half, and how it was made:
// libvirt before 9.7 has no other place for that.
func networkID(name, text string) string {
	var id uuid.UUID
	owner := sha256.Sum256([]byte("https://solstice-ci.org/xmlns/network/1 " + name))
	content := sha256.Sum256([]byte(text))
	copy(id[:8], owner[:])
	copy(id[8:], content[:])
	id[6] = id[6]&0x0f | 0x80 // RFC 9562, section 5.8
	id[8] = id[8]&0x3f | 0x80
	return id.String()
}

// owned says that two networks' IDs have the same first half.
func owned(a, b string) bool { return len(a) == len(b) && len(a) > 18 && a[:18] == b[:18] }

// isolate makes rules and network where they are not there: the rules first, each
// time, for nobody says when somebody flushed them.
func (p *Provider) isolate(ctx context.Context, h hypervisor) error {
	i := p.cfg.Isolation
	unlock, err := p.locks.Lock(ctx, networkLock)
	if err != nil {
		return context.Cause(ctx)
	}
	defer unlock()
	name, id, text, err := i.network()
	if err != nil {
		return err
	}
	is, err := call(ctx, func() (string, error) { return h.Network(name) })
	there := !errors.Is(err, errNoNetwork)
	if there && err != nil {
		return err
	}
	if there && is != id {
		if err := p.replace(ctx, h, name, is, id); err != nil {
			return err
		}
		there = false
	}
	if _, taken := p.cfg.firewall.addresses(name); taken && !there {
		return invalid("isolation: there is an interface %s, which is no network of Solstice: choose another name", name)
	}
	if err := p.cfg.firewall.apply(i); err != nil {
		return fmt.Errorf("rules of %s: %w", name, err)
	}
	p.cfg.failpoint("rules")
	if !there {
		if err := settle(ctx, func() error { return h.StartNetwork(text) }); err != nil && !errors.Is(err, errExists) {
			return fmt.Errorf("network %s: %w", name, err)
		}
	}
	p.cfg.failpoint("network")
	if has, _ := p.cfg.firewall.addresses(name); !slices.Contains(has, i.host()) {
		return invalid("isolation: libvirtd made the bridge %s with %s, and it is not here: libvirtd and this process have to be in the same network namespace", name, i.host())
	}
	return nil
}

// guard brings back rules that somebody flushed while machines run, as the reload
// of a host's own rules does.
func (p *Provider) guard() {
	defer p.busy.Done()
	tick := time.NewTicker(guardEvery)
	defer tick.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-tick.C:
		}
		p.cfg.failpoint("guard")
		if !p.cfg.firewall.intact(p.cfg.Isolation) {
			p.log.Warn("somebody flushed the rules that isolate machines", "bridge", p.cfg.Isolation.Bridge)
			h, err := p.connected(p.ctx)
			if err == nil {
				err = p.isolate(p.ctx, h)
			}
			if err != nil {
				p.log.Error("machines are not isolated", "bridge", p.cfg.Isolation.Bridge, "error", err)
			}
		}
		p.cfg.failpoint("guarded")
	}
}

// replace stops a network of ours that was made from another configuration.
func (p *Provider) replace(ctx context.Context, h hypervisor, name, is, id string) error {
	if !owned(is, id) {
		return invalid("isolation: there is a network %s, which is not Solstice's: choose another name", name)
	}
	users, err := p.users(ctx, h)
	if err != nil {
		return err
	}
	if users > 0 {
		return invalid("isolation: the network %s was made from another configuration, and %d machines are in it: try again when they are gone, or choose another name", name, users)
	}
	return settle(ctx, func() error { return h.StopNetwork(name) })
}

// users counts the interfaces in the network, of whomever.
func (p *Provider) users(ctx context.Context, h hypervisor) (n int, err error) {
	domains, err := call(ctx, h.Domains)
	for _, d := range domains {
		n += len(interfaces(d.XML, p.cfg.Isolation.Bridge))
	}
	return n, err
}

// unisolate removes network and rules, unless a machine is there.
func (p *Provider) unisolate(ctx context.Context, h hypervisor) error {
	name, id, _, err := p.cfg.Isolation.network()
	if err != nil {
		return err
	}
	is, err := call(ctx, func() (string, error) { return h.Network(name) })
	switch {
	case errors.Is(err, errNoNetwork):
	case err != nil:
		return err
	case !owned(is, id):
		return nil
	default:
		if n, err := p.users(ctx, h); err != nil || n > 0 {
			return err
		}
		if err := settle(ctx, func() error { return h.StopNetwork(name) }); err != nil && !errors.Is(err, errNoNetwork) {
			return err
		}
	}
	return p.cfg.firewall.remove(name)
}

// networkLock is no machine's ID.
const networkLock = "@network"

// firewall is what of the kernel the isolation needs.
type firewall interface {
	// apply puts the rules in place of those that are there, at once.
	apply(i *Isolation) error
	// intact says that nobody flushed them.
	intact(i *Isolation) bool
	// remove takes them away; that there are none is no error.
	remove(bridge string) error
	// addresses are those of an interface, in this network namespace.
	addresses(name string) (addrs []netip.Addr, there bool)
}
