package libvirtvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// kernel is the kernel's firewall, nftables.
type kernel struct{}

func (kernel) addresses(name string) (addrs []netip.Addr, there bool) {
	in, err := net.InterfaceByName(name)
	if err != nil {
		return nil, false
	}
	all, _ := in.Addrs() // none, if it is gone meanwhile
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			addrs = append(addrs, p.Addr())
		}
	}
	return addrs, true
}

// tables are those of a bridge: what a frame may be, and where a packet may go.
func tables(bridge string) (frames, packets *nftables.Table) {
	name := "solstice-" + bridge
	return &nftables.Table{Family: nftables.TableFamilyBridge, Name: name}, &nftables.Table{Family: nftables.TableFamilyINet, Name: name}
}

func (kernel) remove(bridge string) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	frames, packets := tables(bridge)
	for _, t := range []*nftables.Table{frames, packets} {
		c.AddTable(t) // so that there is one
		c.DelTable(t)
	}
	return flush(c)
}

func (kernel) intact(i *Isolation) bool {
	c, err := nftables.New()
	if err != nil {
		return false
	}
	frames, packets := tables(i.Bridge)
	for t, chains := range map[*nftables.Table][]string{frames: {chainFrames}, packets: {chainSources, chainHost, chainBeyond, chainMasquerade}} {
		for _, name := range chains {
			if rules, err := c.GetRules(t, &nftables.Chain{Table: t, Name: name}); err != nil || len(rules) == 0 {
				return false
			}
		}
	}
	return true
}

// flush commits, all or nothing.
func flush(c *nftables.Conn) error {
	err := c.Flush()
	if errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("%w: this process needs the capability CAP_NET_ADMIN: %w", vmprovider.ErrInvalid, err)
	}
	return err
}

func (kernel) apply(i *Isolation) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	frames, packets := tables(i.Bridge)
	for _, t := range []*nftables.Table{frames, packets} {
		c.AddTable(t)
		c.DelTable(t)
		c.AddTable(t)
	}
	if err := i.frames(c, frames); err != nil {
		return err
	}
	i.packets(c, packets)
	return flush(c)
}

// A match is some of a rule's expressions.
type match []expr.Any

func meta(key expr.MetaKey, op expr.CmpOp, value []byte) match {
	return match{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Register: 1, Op: op, Data: value}}
}

func payload(base expr.PayloadBase, offset uint32, op expr.CmpOp, value []byte) match {
	return match{
		&expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: uint32(len(value))}, //nolint:gosec // few bytes
		&expr.Cmp{Register: 1, Op: op, Data: value},
	}
}

func name(s string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, s)
	return b
}

// Offsets in an IPv4 header.
const (
	source      = 12
	destination = 16
)

// in says that an address of an IPv4 packet is in a net.
func in(net netip.Prefix, offset uint32) match {
	m := payload(expr.PayloadBaseNetworkHeader, offset, expr.CmpOpEq, net.Addr().AsSlice())
	mask := binary.BigEndian.AppendUint32(nil, ^uint32(0)<<(32-net.Bits()))
	return slices.Insert(m, 1, expr.Any(&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)}))
}

// to is what an Allowed matches.
func to(a Allowed) match {
	protocol := byte(unix.IPPROTO_TCP)
	if a.Protocol == UDP {
		protocol = unix.IPPROTO_UDP
	}
	return slices.Concat(
		in(a.To, destination),
		meta(expr.MetaKeyL4PROTO, expr.CmpOpEq, []byte{protocol}),
		payload(expr.PayloadBaseTransportHeader, 2, expr.CmpOpEq, binary.BigEndian.AppendUint16(nil, a.Port)),
	)
}

func tracked(state uint32) match {
	return match{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(state), Xor: make([]byte, 4)},
		&expr.Cmp{Register: 1, Op: expr.CmpOpNeq, Data: make([]byte, 4)},
	}
}

var (
	ipv4    = meta(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{unix.NFPROTO_IPV4})
	notIPv4 = meta(expr.MetaKeyNFPROTO, expr.CmpOpNeq, []byte{unix.NFPROTO_IPV4})
	// An answer belongs to a connection that the other side began: one that began
	// while somebody had flushed the rules does not go on.
	answer  = slices.Concat(tracked(expr.CtStateBitESTABLISHED), match{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, &expr.Cmp{Register: 1, Data: []byte{1}}})
	related = tracked(expr.CtStateBitRELATED)
	dhcp    = slices.Concat(
		meta(expr.MetaKeyL4PROTO, expr.CmpOpEq, []byte{unix.IPPROTO_UDP}),
		payload(expr.PayloadBaseTransportHeader, 0, expr.CmpOpEq, []byte{0, 68, 0, 67}),
	)
	nowhere   = netip.MustParsePrefix("0.0.0.0/32")
	linkLocal = netip.MustParsePrefix("169.254.0.0/16")
)

// Names of the chains, by what they decide.
const (
	chainFrames     = "frames"
	chainSources    = "sources"
	chainHost       = "host"
	chainBeyond     = "beyond"
	chainMasquerade = "masquerade"
)

// chain adds rules, each a verdict and what it is for.
type chain struct {
	c  *nftables.Conn
	on *nftables.Chain
}

func newChain(c *nftables.Conn, t *nftables.Table, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority, name string) chain {
	return chain{c, c.AddChain(&nftables.Chain{Table: t, Name: name, Type: kind, Hooknum: hook, Priority: priority})}
}

func (c chain) rule(last expr.Any, matches ...match) {
	c.c.AddRule(&nftables.Rule{Table: c.on.Table, Chain: c.on, Exprs: append(slices.Concat(matches...), last)})
}

func (c chain) accept(matches ...match) { c.rule(&expr.Verdict{Kind: expr.VerdictAccept}, matches...) }

func (c chain) drop(matches ...match) { c.rule(&expr.Verdict{Kind: expr.VerdictDrop}, matches...) }

// packets decides after the host's own address translation. A packet that is
// accepted here may still be dropped by another table of the host; one that is
// dropped is dropped.
func (i *Isolation) packets(c *nftables.Conn, t *nftables.Table) {
	bridge := name(i.Bridge)
	notFrom := meta(expr.MetaKeyIIFNAME, expr.CmpOpNeq, bridge)
	onto, notOnto := meta(expr.MetaKeyOIFNAME, expr.CmpOpEq, bridge), meta(expr.MetaKeyOIFNAME, expr.CmpOpNeq, bridge)

	first := newChain(c, t, nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, chainSources)
	first.accept(notFrom)
	first.drop(notIPv4)
	first.accept(in(i.Subnet, source))
	first.accept(in(nowhere, source), dhcp)
	first.drop()

	host := newChain(c, t, nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, chainHost)
	host.accept(notFrom)
	host.accept(answer)
	host.accept(related)
	host.accept(ipv4, dhcp)
	for _, a := range i.Allow {
		if a.To.IsSingleIP() {
			host.accept(ipv4, to(a))
		}
	}
	host.drop()

	beyond := newChain(c, t, nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, chainBeyond)
	beyond.accept(notFrom, notOnto)
	beyond.accept(related)
	beyond.accept(onto, answer)
	beyond.drop(onto) // also from machine to machine, by way of the host
	for _, a := range i.Allow {
		if a.To.IsSingleIP() {
			beyond.accept(ipv4, to(a))
		}
	}
	beyond.drop(ipv4, in(linkLocal, destination))
	for _, a := range i.Allow {
		if !a.To.IsSingleIP() {
			beyond.accept(ipv4, to(a))
		}
	}
	beyond.drop()

	masquerade := newChain(c, t, nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, chainMasquerade)
	masquerade.rule(&expr.Masq{}, ipv4, in(i.Subnet, source), notOnto)
}

// Registers of 32 bits, of which the first four are the register 1.
const (
	register4 = unix.NFT_REG32_00 + 4
	register6 = unix.NFT_REG32_00 + 6
)

// frames lets through IPv4 and ARP with the MAC and address of the port that they
// come in by, before the bridge learns anything from them.
func (i *Isolation) frames(c *nftables.Conn, t *nftables.Table) error {
	kind, err := nftables.ConcatSetType(nftables.TypeIFName, nftables.TypeEtherAddr, nftables.TypeIPAddr)
	if err != nil {
		return err
	}
	ports := &nftables.Set{Table: t, Name: "ports", KeyType: nftables.TypeIFName}
	machines := &nftables.Set{Table: t, Name: "machines", KeyType: kind, Concatenation: true}
	var portElements, machineElements []nftables.SetElement
	for _, p := range i.places() {
		portElements = append(portElements, nftables.SetElement{Key: name(p.port)})
		for _, addr := range []netip.Addr{p.addr, nowhere.Addr()} { // one that has no address yet has none
			key := slices.Concat(name(p.port), p.mac, []byte{0, 0}, addr.AsSlice())
			machineElements = append(machineElements, nftables.SetElement{Key: key})
		}
	}
	for set, elements := range map[*nftables.Set][]nftables.SetElement{ports: portElements, machines: machineElements} {
		if err := c.AddSet(set, nil); err != nil {
			return err
		}
		for some := range slices.Chunk(elements, 500) { // as many as a message holds
			if err := c.SetAddElements(set, some); err != nil {
				return err
			}
		}
	}
	port := &expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}
	isPort := match{port, &expr.Lookup{SourceRegister: 1, SetName: ports.Name, SetID: ports.ID}}
	isMachine := func(mac, addr expr.Payload) match {
		mac.Len, mac.DestRegister = 6, register4
		addr.Len, addr.DestRegister, addr.Base = 4, register6, expr.PayloadBaseNetworkHeader
		return match{port, &mac, &addr, &expr.Lookup{SourceRegister: 1, SetName: machines.Name, SetID: machines.ID}}
	}
	ether := func(kind uint16) match {
		return payload(expr.PayloadBaseLLHeader, 12, expr.CmpOpEq, binary.BigEndian.AppendUint16(nil, kind))
	}
	const (
		etherSource = 6 // offset in a frame; the others are in an ARP message
		operation   = 6
		senderMAC   = 8
		senderIP    = 14
		targetIP    = 24
	)
	frame := expr.Payload{Base: expr.PayloadBaseLLHeader, Offset: etherSource}
	arp := func(offset uint32) expr.Payload {
		return expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset}
	}
	first := newChain(c, t, nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, chainFrames)
	first.accept(ether(unix.ETH_P_IP), isMachine(frame, arp(source)))
	first.drop(isPort, ether(unix.ETH_P_ARP), // which of the addresses are the host's is not answered
		payload(expr.PayloadBaseNetworkHeader, operation, expr.CmpOpEq, []byte{0, 1}),
		payload(expr.PayloadBaseNetworkHeader, targetIP, expr.CmpOpNeq, i.host().AsSlice()))
	first.accept(ether(unix.ETH_P_ARP), isMachine(frame, arp(senderIP)), isMachine(arp(senderMAC), arp(senderIP)))
	first.drop(isPort)
	return nil
}
