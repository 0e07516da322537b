//go:build (libvirt || libvirt_dlopen) && cgo

package libvirtvm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// targetScript is the agent of a machine that answers whoever reaches it, also by
// way of the host.
const targetScript = `#!/bin/sh
echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad
ip addr add fd00:99::3/64 dev eth0
ip route add 10.99.0.1/32 dev eth0
ip route add 10.99.0.0/25 via 10.99.0.1
ip route add 10.99.0.128/25 via 10.99.0.1
printf '#!/bin/sh\necho machine\n' >/run/answer
chmod +x /run/answer
nc -ll -p 7000 -e /run/answer &
for addr in 127.0.0.1 fd00:99::3; do
	until nc $addr 7000 </dev/null | grep -q machine; do sleep 0.1; done
done
echo "target: listens"
wait
`

// scanScript is the agent of a machine that looks for what it can reach. What it
// prints begins with "scan".
const scanScript = `#!/bin/sh
echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad
for f in all eth0; do echo 0 >/proc/sys/net/ipv4/conf/$f/accept_redirects; done
lease() { ip addr flush dev eth0; ifconfig eth0 up; udhcpc -i eth0 -q -n -f -t 10 -T 1 -s /bin/udhcpc.script >/dev/null 2>&1; }
own=$(ip -4 addr show eth0 | sed -n 's/.*inet \([0-9.]*\).*/\1/p')
mac=$(cat /sys/class/net/eth0/address)
echo "scan: $own $mac $(cat /etc/resolv.conf)"
next() { wget -q -O /tmp/next http://10.99.0.1:8888/next; }
try() { nc -w "$wait" "$1" "$2" </dev/null 2>/dev/null | head -n 1 | sed "s|^|scan $scan: ${3:-$1 $2} |"; }
resolve() { timeout "$wait" nslookup x.test "$1" 2>/dev/null | grep -q NXDOMAIN && echo "scan $scan: $1 udp 53"; }
scan() { # NAME SECONDS: what is not to be reached is waited for as long
	scan=$1 short=$2
	mkdir -p /tmp/$scan
	ip addr add fd00:99::2/64 dev eth0
	ip -6 route add default via fd00:99::1
	while read -r addr port wait; do
		case $wait in open) wait=60 ;; shut) wait=3 ;; *) wait=$short ;; esac
		if [ $port = dns ]; then resolve $addr; else try $addr $port; fi >/tmp/$scan/$addr-$port 2>/dev/null &
	done <<'TARGETS'
@TARGETS@
TARGETS
	wait=$short
	for addr in 10.99.0.1 192.0.2.2 fd00:99::1; do
		ping -c 1 -W $wait $addr >/dev/null 2>&1 && echo "scan $scan: $addr ping" >/tmp/$scan/$addr-ping &
	done
	wait
}
pretend() { # to be a router's client, another machine, another card
	ip route add @TARGET@/32 via 10.99.0.1
	try @TARGET@ 7000 "target by way of the host" >/tmp/$scan/way
	ip addr flush dev eth0
	ifconfig eth0 @SPARE@
	try 10.99.0.1 50052 "as another address" >/tmp/$scan/address
	ifconfig eth0 down
	ifconfig eth0 hw ether 52:54:00:00:00:99
	ifconfig eth0 $own up
	try 10.99.0.1 50052 "as another MAC" >/tmp/$scan/mac
	ifconfig eth0 down
	ifconfig eth0 hw ether $mac
	lease
}
tell() { cat /tmp/$scan/*; echo "scan $scan: end"; next; }
next
scan 1 3; pretend; tell
scan 2 60; pretend; tell
scan 3 3; tell
wget -q -O /tmp/disk http://10.99.0.1:8888/disk
dd if=/tmp/disk of=/dev/vda conv=fsync 2>/dev/null
echo "scan: disk written"
`

// answers listens, and tells whoever comes what it is and whom it sees.
func answers(addr, what string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = fmt.Fprintf(c, "%s sees %s\n", what, c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
			_ = c.Close()
		}
	}()
	return nil
}

// names listens as a name server that knows none.
func names(addr string) error {
	c, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	go func() {
		for {
			b := make([]byte, 512)
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			b[2], b[3] = b[2]|0x80, 3 // an answer: NXDOMAIN
			_, _ = c.WriteTo(b[:n], from)
		}
	}()
	return nil
}

// rig is a host in a network namespace of its own, with what listens on it and
// beyond it.
func rig(t *testing.T) {
	t.Helper()
	testenv.Beyond(t, "out", "far", func() error {
		for _, args := range []string{"addr add 192.0.2.2/24 dev far", "addr add 169.254.169.254/32 dev far", "link set far up", "route add default via 192.0.2.1"} {
			if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
				return fmt.Errorf("%s: %w: %s", args, err, out)
			}
		}
		return errors.Join(answers(":5432", "database beyond"), answers(":443", "web beyond"), answers(":80", "metadata"), answers(":22", "ssh beyond"), names("192.0.2.2:53"))
	})
	for _, args := range []string{"addr add 192.0.2.1/24 dev out", "addr add 2001:db8:2::1/64 dev out nodad", "link set out up", "route add 169.254.169.254/32 dev out"} {
		testenv.IP(t, strings.Fields(args)...)
	}
	if err := errors.Join(answers(":5432", "database"), answers(":5672", "broker"), answers(":50051", "clients"), answers(":50052", "agents"),
		answers(":8080", "dashboard"), answers(":443", "web"), answers(":80", "plain web")); err != nil {
		t.Fatal(err)
	}
}

// TestIsolated: what a machine reaches is what is listed, while the rules are
// there.
func TestIsolated(t *testing.T) {
	t.Parallel() // it waits more than it works
	if !testenv.OwnNetwork(t) {
		return
	}
	mini := vmprovider.Image{Path: testenv.MiniGuest(t), Format: "qcow2"}
	s := testenv.StartLibvirt(t)
	rig(t)
	cfg := config(s)
	cfg.Network, cfg.MemoryBytes = Network{}, 256<<20
	cfg.Isolation = &Isolation{Bridge: "sol0", Subnet: netip.MustParsePrefix("10.99.0.0/24"), Allow: allowed(t,
		"tcp/10.99.0.1:8888", "tcp/10.99.0.1:50052", "tcp/192.0.2.2:5432", "udp/192.0.2.2:53", "tcp/192.0.2.0/24:443", "tcp/0.0.0.0/0:80", "tcp/0.0.0.0/0:7000",
	)}
	foreign(t, s, cfg)
	rules(t)

	// One that was killed, whose network somebody stopped, is no obstacle.
	leaveNetwork(t, cfg)
	s.Virsh(t, "net-destroy", "sol0")
	var guard sync.Mutex // held: it rests
	cfg.failpoint = func(name string) {
		switch name {
		case "guard":
			guard.Lock()
		case "guarded":
			guard.Unlock()
		}
	}
	p := provider(t, cfg)
	t.Cleanup(func() { _ = p.Close() })

	next := make(chan struct{})
	disk, secret := trap(t)
	scripts := http.NewServeMux()
	scripts.HandleFunc("/next", func(http.ResponseWriter, *http.Request) { <-next })
	scripts.HandleFunc("/disk", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, disk) })
	listener, err := net.Listen("tcp", ":8888")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: scripts, ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close() })
	create := func(id, script string) *bufio.Scanner {
		t.Helper()
		scripts.HandleFunc("/"+id+"/linux/amd64", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(script)) })
		spec := vmprovider.Spec{ID: id, Owner: "me", Image: mini, Bootstrap: bootstrap()}
		sum := sha256.Sum256([]byte(script))
		spec.Bootstrap.RunnerURL, spec.Bootstrap.AgentSHA256 = "http://10.99.0.1:8888/"+id, map[string]string{"linux/amd64": hex.EncodeToString(sum[:])}
		if _, err := p.Create(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
		console, err := consoler{p}.Console(t.Context(), id, true)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = console.Close() })
		return bufio.NewScanner(console)
	}
	targetLines := create("target", targetScript)
	target := placeIn(t, s, "target").addr.String()

	// The bridge gets IPv6 addresses, which it has not by itself.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/sol0/disable_ipv6", []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	testenv.IP(t, "addr", "add", "fd00:99::1/64", "dev", "sol0", "nodad")
	for _, addr := range []string{"10.99.0.1:53", "192.0.2.1:53"} {
		if err := names(addr); err != nil {
			t.Fatal(err)
		}
	}
	open := []string{"10.99.0.1 50052", "192.0.2.2 5432", "192.0.2.2 443", "192.0.2.2 80", "192.0.2.2 dns"}
	shut := []string{target + " 7000", "fd00:99::3 7000"}
	closed := []string{"192.0.2.2 22", "169.254.169.254 80", "10.99.0.1 dns", "192.0.2.1 dns"}
	for _, addr := range []string{"10.99.0.1", "192.0.2.1", "fd00:99::1", "2001:db8:2::1"} {
		for _, port := range []string{"5432", "5672", "50051", "50052", "8080", "443", "80"} {
			if !slices.Contains(open, addr+" "+port) {
				closed = append(closed, addr+" "+port)
			}
		}
	}
	targets := strings.Join(open, " open\n") + " open\n" + strings.Join(shut, " shut\n") + " shut\n" + strings.Join(closed, "\n")
	spare := netip.MustParseAddr("10.99.0.77")
	if spare.String() == target {
		spare = spare.Next()
	}
	lines := create("scan", strings.NewReplacer("@TARGETS@", targets, "@TARGET@", target, "@SPARE@", spare.String()).Replace(scanScript))
	await(t, targetLines, "target: listens")
	next <- struct{}{}
	if line := await(t, lines, "scan: "); !strings.HasSuffix(line, "nameserver 192.0.2.2") {
		t.Errorf("the name server was not announced: %s", line)
	}
	reached := func() (found []string) {
		t.Helper()
		for {
			line := await(t, lines, "scan ")
			_, what, _ := strings.Cut(line, ": ")
			if what == "end" {
				slices.Sort(found)
				return found
			}
			found = append(found, what)
		}
	}
	want := []string{
		"10.99.0.1 50052 agents sees", "192.0.2.2 443 web beyond sees 192.0.2.1", "192.0.2.2 5432 database beyond sees 192.0.2.1",
		"192.0.2.2 80 metadata sees 192.0.2.1", "192.0.2.2 udp 53",
	}
	isolated := func(when string) {
		t.Helper()
		got := reached()
		if len(got) != len(want) {
			t.Errorf("%s: reached\n%s\nwant\n%s", when, strings.Join(got, "\n"), strings.Join(want, "\n"))
			return
		}
		for i := range got {
			if !strings.HasPrefix(got[i], want[i]) {
				t.Errorf("%s: reached %s, want %s", when, got[i], want[i])
			}
		}
	}
	isolated("with rules")

	// The planted bug: somebody flushes the rules. The scan sees it, but no other
	// machine on the same bridge.
	if !(kernel{}).intact(cfg.Isolation) {
		t.Error("the rules are there, and are missed")
	}
	guard.Lock()
	wake := sync.OnceFunc(guard.Unlock)
	t.Cleanup(wake)
	if err := (kernel{}).remove("sol0"); err != nil {
		t.Fatal(err)
	}
	if (kernel{}).intact(cfg.Isolation) {
		t.Error("nobody misses the rules")
	}
	next <- struct{}{}
	got := strings.Join(reached(), "\n")
	for _, reached := range []string{
		"10.99.0.1 5432 database sees", "192.0.2.1 5672 broker", "10.99.0.1 50051 clients", "fd00:99::1 8080 dashboard", "2001:db8:2::1 5432 database",
		"192.0.2.2 22 ssh beyond", "169.254.169.254 80 metadata", "10.99.0.1 ping", "fd00:99::1 ping", "192.0.2.1 udp 53",
		"target by way of the host machine", "as another address agents sees " + spare.String(), "as another MAC agents",
	} {
		if !strings.Contains(got, reached) {
			t.Errorf("without rules %q is not reached: the test sees too little:\n%s", reached, got)
		}
	}
	for _, addr := range shut {
		if strings.Contains(got, addr) {
			t.Errorf("ports are not isolated: %s", addr)
		}
	}

	// The next machine brings the rules back. They hold also where the packets of
	// bridges do not pass the rules of routers.
	_ = os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte("0"), 0) // not every kernel has it
	if _, err := p.Create(t.Context(), vmprovider.Spec{ID: "third", Owner: "me", Image: image(t, t.TempDir(), halt), MemoryBytes: 32 << 20, Bootstrap: bootstrap()}); err != nil {
		t.Fatal(err)
	}
	wake()
	next <- struct{}{}
	isolated("restored")
	next <- struct{}{}

	await(t, lines, "scan: disk written")
	if _, err := vmprovider.Wait(t.Context(), p, "scan", func(i vmprovider.Instance) bool { return i.State == vmprovider.StateStopped }); err != nil {
		t.Fatal(err)
	}
	nowhereLeads(t, s, mini, secret)

	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if _, there := (kernel{}).addresses("sol0"); !there {
		t.Error("the network went with its provider, and machines are in it")
	}
	p = provider(t, cfg)
	for _, id := range []string{"target", "scan", "third"} {
		if err := p.Destroy(t.Context(), id, vmprovider.DestroyOptions{}); err != nil {
			t.Error(err)
		}
	}
	nothing(t, s, p)
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	onlyForeign(t, s)
}

// placeIn is a machine's place in the network.
func placeIn(t *testing.T, s *testenv.LibvirtServer, id string) place {
	t.Helper()
	nics := interfaces(s.Virsh(t, "dumpxml", id), "sol0")
	if len(nics) != 1 {
		t.Fatalf("%s has %d interfaces", id, len(nics))
	}
	mac, err := net.ParseMAC(nics[0].MAC.Address)
	if err != nil {
		t.Fatal(err)
	}
	return placeOf(netip.AddrFrom4([4]byte(mac[2:])))
}

// await gives the next line that begins so.
func await(t *testing.T, lines *bufio.Scanner, prefix string) string {
	t.Helper()
	var seen []string
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), "\r")
		if strings.HasPrefix(line, prefix) {
			return line
		}
		seen = append(seen, line)
	}
	t.Fatalf("the console ended without %q: %v\n%s", prefix, lines.Err(), strings.Join(seen, "\n"))
	return ""
}

// foreign makes a network and a table of somebody else's, and shows that a
// provider refuses that network.
func foreign(t *testing.T, s *testenv.LibvirtServer, cfg Config) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "network.xml")
	if err := os.WriteFile(file, []byte(`<network><name>foreign</name><forward mode="open"/><bridge name="foreign"/><ip address="10.77.0.1" prefix="24"/></network>`), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Virsh(t, "net-create", file)
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "foreign"})
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"foreign": "not Solstice's", "out": "no network of Solstice"} {
		refused := cfg
		refused.Isolation = &Isolation{Bridge: name, Subnet: cfg.Isolation.Subnet}
		if _, err := New(t.Context(), refused); !errors.Is(err, vmprovider.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("a foreign %s: %v", name, err)
		}
	}
	onlyForeign(t, s)
}

// rules applies many, and some without the right to.
func rules(t *testing.T) {
	t.Helper()
	large := &Isolation{Bridge: "large", Subnet: netip.MustParsePrefix("10.96.0.0/22")}
	for range 2 {
		if err := (kernel{}).apply(large); err != nil {
			t.Error(err)
		}
	}
	if err := (kernel{}).remove("large"); err != nil {
		t.Error(err)
	}
	unprivileged := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread is of no use to others
		var none [2]unix.CapUserData
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
			unprivileged <- err
			return
		}
		unprivileged <- kernel{}.apply(large)
	}()
	if err := <-unprivileged; !errors.Is(err, vmprovider.ErrInvalid) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Errorf("without privileges: %v", err)
	}
}

// onlyForeign asserts that nothing is there but what the rig and foreign made.
func onlyForeign(t *testing.T, s *testenv.LibvirtServer) {
	t.Helper()
	interfaces, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, i := range interfaces {
		names = append(names, i.Name)
	}
	slices.Sort(names)
	names = slices.DeleteFunc(names, func(n string) bool { return strings.HasSuffix(n, "0") && n != "sol0" }) // tunnels that some kernels make
	if !slices.Equal(names, []string{"foreign", "lo", "out"}) {
		t.Errorf("interfaces: %v", names)
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := c.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		if strings.HasPrefix(table.Name, "solstice") {
			t.Errorf("table %s is left", table.Name)
		}
	}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == "foreign" }) {
		t.Error("the foreign table is gone")
	}
	if got := strings.TrimSpace(s.Virsh(t, "net-list", "--all", "--name")); got != "foreign" {
		t.Errorf("networks: %s", got)
	}
	here, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range processes {
		argv, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		if in, err := os.Readlink(filepath.Join(dir, "ns/net")); err == nil && in == here && bytes.Contains(argv, []byte("dnsmasq/sol0.conf")) {
			t.Errorf("left: %q", argv)
		}
	}
}

// leaveNetwork ends a New when it has made the network, as if the process had
// been killed there.
func leaveNetwork(t *testing.T, cfg Config) {
	t.Helper()
	at := make(chan struct{})
	cfg.failpoint = func(name string) {
		if name == "network" {
			close(at)
			select {}
		}
	}
	go func() { _, _ = New(context.WithoutCancel(t.Context()), cfg) }()
	<-at
}

// trap is a disk whose header names a file of the host as what it is laid over,
// and what is in that file.
func trap(t *testing.T) (disk, secret string) {
	t.Helper()
	dir := t.TempDir()
	disk, secret = filepath.Join(dir, "disk"), "a secret of the host"
	if err := os.WriteFile(filepath.Join(dir, "secret"), bytes.Repeat([]byte(secret+"\n"), 1<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", filepath.Join(dir, "secret"), disk, "64M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return disk, secret
}

// nowhereLeads asserts that the header which the guest wrote is data.
func nowhereLeads(t *testing.T, s *testenv.LibvirtServer, base vmprovider.Image, secret string) {
	t.Helper()
	file := filepath.Join(s.PoolPath, volume("scan", "me", diskVolume))
	info, err := exec.Command("qemu-img", "info", "-f", "qcow2", "--backing-chain", file).CombinedOutput()
	if err != nil || strings.Count(string(info), "image: ") != 2 || !strings.Contains(string(info), "backing file: "+base.Path+"\n") {
		t.Errorf("the chain: %v, %s", err, info)
	}
	s.Virsh(t, "pool-refresh", s.Pool)
	if x := s.Virsh(t, "vol-dumpxml", filepath.Base(file), s.Pool); !strings.Contains(x, "<path>"+base.Path+"</path>") || strings.Contains(x, "secret") {
		t.Errorf("the volume: %s", x)
	}
	raw := filepath.Join(t.TempDir(), "raw")
	if out, err := exec.Command("qemu-img", "convert", "-f", "qcow2", "-O", "raw", file, raw).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	content, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(content, []byte("QFI\xfb")) || bytes.Contains(content, []byte(secret)) {
		t.Errorf("the disk begins with %q, and shows the host's file: %t", content[:8], bytes.Contains(content, []byte(secret)))
	}
}
