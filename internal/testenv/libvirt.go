package testenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// LibvirtServer is a libvirtd for QEMU that only this test uses. It and what it
// starts are in a PID and a mount namespace of their own, so that nothing of it
// is left when the test ends, and nothing of the host's libvirtd is seen.
type LibvirtServer struct {
	URI      string
	Pool     string // storage pool of type dir
	PoolPath string
	Images   string // directory for images, which QEMU may read

	dir     string
	uid     int    // whose libvirtd it is; root's is the system's
	pidPath string // of the files with the pids of QEMUs
}

// StartLibvirt starts a libvirtd, in the network namespace of this process; it
// needs root.
func StartLibvirt(t testing.TB) *LibvirtServer {
	t.Helper()
	return startLibvirt(t, 0)
}

// StartLibvirtSession starts a libvirtd as a user without privileges has it, for
// qemu:///session.
func StartLibvirtSession(t testing.TB) *LibvirtServer {
	t.Helper()
	return startLibvirt(t, nobody)
}

const nobody = 65534

func startLibvirt(t testing.TB, uid int) *LibvirtServer {
	t.Helper()
	for program, pkg := range map[string]string{
		"libvirtd": "libvirt-daemon-system", "virsh": "libvirt-clients", "qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils", "tini": "tini",
	} {
		if _, err := exec.LookPath(program); err != nil {
			Missing(t, "libvirt with QEMU", fmt.Sprintf("%v (Debian: apt-get install %s)", err, pkg))
		}
	}
	if os.Geteuid() != 0 {
		Missing(t, "libvirt with QEMU", "a libvirtd of one's own needs root")
	}
	s := &LibvirtServer{Pool: "solstice", uid: uid}
	private(t, "libvirt", func(dir string) error {
		s.dir, s.PoolPath, s.Images = dir, filepath.Join(dir, "pool"), filepath.Join(dir, "images")
		s.pidPath = filepath.Join(dir, "run/libvirt/qemu")
		path := "/system"
		if uid != 0 {
			path, s.pidPath = "/session", filepath.Join(dir, "user/libvirt/qemu/run")
		}
		s.URI = "qemu://" + path + "?socket=" + s.socket()
		return s.launch()
	})
	t.Cleanup(func() {
		if t.Failed() {
			for _, log := range []string{"namespace.log", "libvirtd.log", "messages.log"} {
				b, _ := os.ReadFile(filepath.Join(s.dir, log))
				t.Logf("%s:\n%s", log, b[max(0, len(b)-4000):])
			}
		}
	})
	return s
}

// enter makes the namespaces, in which the directories that libvirt uses are
// others, and keeps them until it is killed.
const enter = `
set -e
for d in etc/libvirt var/lib/libvirt var/cache/libvirt var/log/libvirt run/libvirt; do
	mkdir -p "/$d" "$1/$d"
	mount --bind "$1/$d" "/$d"
done
if [ "$2" = true ]; then # /sys shows the network namespace that it was mounted in
	mkdir "$1/cgroup"
	mount --rbind /sys/fs/cgroup "$1/cgroup"
	mount -t sysfs sysfs /sys
	mount --rbind "$1/cgroup" /sys/fs/cgroup
fi
mkdir -p "$1/etc/libvirt/qemu"
echo 'stdio_handler = "file"
user = "root"
group = "root"
security_driver = "none"' >/etc/libvirt/qemu.conf
: >"$1/entered"
exec tini -- sleep infinity
`

func (s *LibvirtServer) socket() string { return filepath.Join(s.dir, "sock/libvirt-sock") }

func (s *LibvirtServer) launch() error {
	for _, d := range []string{".", "sock", "pool", "images", "user"} {
		d = filepath.Join(s.dir, d)
		if err := errors.Join(os.MkdirAll(d, 0o700), os.Chown(d, s.uid, s.uid)); err != nil {
			return err
		}
	}
	conf := fmt.Sprintf("unix_sock_dir = %q\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\nlog_outputs = \"3:file:%s\"\n",
		filepath.Join(s.dir, "sock"), filepath.Join(s.dir, "messages.log"))
	if err := os.WriteFile(filepath.Join(s.dir, "libvirtd.conf"), []byte(conf), 0o644); err != nil {
		return err
	}
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + s.dir}
	if err := spawn(s.dir, "namespace", env, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", enter, "sh", s.dir, strconv.FormatBool(inOwnNetwork())); err != nil {
		return err
	}
	entered := func(context.Context) error {
		_, err := os.Stat(filepath.Join(s.dir, "entered"))
		return err
	}
	if err := await(s.dir, "namespace.pid", entered, "namespace.log"); err != nil {
		return err
	}
	if err := s.start(); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"pool-define-as", s.Pool, "dir", "--target", s.PoolPath}, {"pool-autostart", s.Pool}, {"pool-start", s.Pool},
	} {
		if _, err := s.virsh(args...); err != nil {
			return err
		}
	}
	return nil
}

// inside is a command in the namespaces.
func (s *LibvirtServer) inside(argv ...string) ([]string, error) {
	pid, err := readPID(filepath.Join(s.dir, "namespace.pid"))
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return nil, err
	}
	return append([]string{"nsenter", "-t", strings.TrimSpace(string(b)), "--mount", "--pid", "--"}, argv...), nil
}

func (s *LibvirtServer) start() error {
	id := strconv.Itoa(s.uid)
	argv, err := s.inside("setpriv", "--reuid="+id, "--regid="+id, "--clear-groups",
		"libvirtd", "-f", filepath.Join(s.dir, "libvirtd.conf"), "-p", filepath.Join(s.dir, "daemon"))
	if err != nil {
		return err
	}
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + s.dir, "XDG_RUNTIME_DIR=" + filepath.Join(s.dir, "user")}
	if err := spawn(s.dir, "libvirtd", env, argv...); err != nil {
		return err
	}
	return await(s.dir, "libvirtd.pid", func(context.Context) error {
		_, err := s.virsh("list")
		return err
	}, "libvirtd.log", "messages.log")
}

// Image gives a place where QEMU may read an image file.
func (s *LibvirtServer) Image(t testing.TB, file string) string {
	t.Helper()
	if s.uid == 0 {
		return file
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(s.Images, filepath.Base(file))
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

func (s *LibvirtServer) virsh(args ...string) (string, error) {
	cmd := exec.Command("virsh", append([]string{"-q", "-c", s.URI}, args...)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("virsh %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(said.Bytes()))
	}
	return string(out), nil
}

// Virsh runs a command of virsh and gives what it says.
func (s *LibvirtServer) Virsh(t testing.TB, args ...string) string {
	t.Helper()
	out, err := s.virsh(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Messages are libvirtd's warnings and errors.
func (s *LibvirtServer) Messages(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.dir, "messages.log"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// FillPool puts a file system without room in the pool's place.
func (s *LibvirtServer) FillPool(t testing.TB) {
	t.Helper()
	s.run(t, `mount -t tmpfs -o size=16k full "$1" && ! dd if=/dev/zero of="$1/filler" bs=4k 2>/dev/null`, s.PoolPath)
}

// FullPool makes another storage pool, on a file system that has no room until
// makeRoom is called.
func (s *LibvirtServer) FullPool(t testing.TB, pool string) (makeRoom func(testing.TB)) {
	t.Helper()
	dir := filepath.Join(s.dir, pool)
	s.run(t, `mkdir "$1" && mount -t tmpfs -o size=64m full "$1" && ! dd if=/dev/zero of="$1/filler" bs=1M 2>/dev/null`, dir)
	s.Virsh(t, "pool-define-as", pool, "dir", "--target", dir)
	s.Virsh(t, "pool-autostart", pool)
	s.Virsh(t, "pool-start", pool)
	return func(t testing.TB) {
		t.Helper()
		s.run(t, `rm "$1/filler"`, dir)
	}
}

// Remote forwards a TCP port of the loopback to libvirtd, at which it is one of
// another host to libvirt: uri. cut closes the connections that there are.
func (s *LibvirtServer) Remote(t testing.TB) (uri string, cut func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var open []net.Conn
	cut = func() {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range open {
			_ = c.Close()
		}
		open = nil
	}
	t.Cleanup(func() {
		_ = l.Close()
		cut()
	})
	go func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("unix", s.socket())
			if err != nil {
				_ = from.Close()
				continue
			}
			mu.Lock()
			open = append(open, from, to)
			mu.Unlock()
			forward := func(to, from net.Conn) {
				_, _ = io.Copy(to, from)
				_, _ = to.Close(), from.Close()
			}
			go forward(to, from)
			go forward(from, to)
		}
	}()
	u, err := url.Parse(s.URI)
	if err != nil {
		t.Fatal(err)
	}
	return "qemu+tcp://" + l.Addr().String() + u.Path, cut
}

// run runs a shell script in the namespaces.
func (s *LibvirtServer) run(t testing.TB, script string, args ...string) string {
	t.Helper()
	argv, err := s.inside(append([]string{"sh", "-c", script, "sh"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, said.Bytes())
	}
	return string(out)
}

// signal reaches a process by its pid in the namespace.
func (s *LibvirtServer) signal(t testing.TB, sig syscall.Signal, pidFile string) {
	t.Helper()
	pid, err := readPID(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	s.run(t, `kill "-$1" "$2"`, strconv.Itoa(int(sig)), strconv.Itoa(pid))
}

// Kill ends libvirtd as a crash would; guests run on.
func (s *LibvirtServer) Kill(t testing.TB) {
	t.Helper()
	s.signal(t, syscall.SIGKILL, filepath.Join(s.dir, "daemon"))
	pid, err := readPID(filepath.Join(s.dir, "libvirtd.pid")) // of nsenter, which waits for it
	if err != nil {
		t.Fatal(err)
	}
	waitGone(t, pid)
	if err := os.Remove(filepath.Join(s.dir, "libvirtd.pid")); err != nil {
		t.Fatal(err)
	}
}

// Start starts libvirtd again after Kill.
func (s *LibvirtServer) Start(t testing.TB) {
	t.Helper()
	if err := s.start(); err != nil {
		t.Fatalf("start libvirtd: %v", err)
	}
}

// Pause stops libvirtd with SIGSTOP: connections stay open and nothing answers.
func (s *LibvirtServer) Pause(t testing.TB) {
	t.Helper()
	s.signal(t, syscall.SIGSTOP, filepath.Join(s.dir, "daemon"))
}

// Resume ends a Pause.
func (s *LibvirtServer) Resume(t testing.TB) {
	t.Helper()
	s.signal(t, syscall.SIGCONT, filepath.Join(s.dir, "daemon"))
}

// SignalGuest sends a signal to the QEMU of a domain.
func (s *LibvirtServer) SignalGuest(t testing.TB, name string, sig syscall.Signal) {
	t.Helper()
	s.signal(t, sig, filepath.Join(s.pidPath, name+".pid"))
}

// Guests are the names of the domains that have a QEMU process, whatever libvirtd
// knows of it.
func (s *LibvirtServer) Guests(t testing.TB) []string {
	t.Helper()
	return strings.Fields(s.run(t, `cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' '\n' | sed -n 's/^guest=\([^,]*\),.*/\1/p'`))
}

// Foreign names the domain and the volume of Foreigners.
const Foreign = "sol-foreign"

// Foreigners makes a domain that runs and a volume, both of somebody else, and
// gives what fails the test when they are not as they were.
func (s *LibvirtServer) Foreigners(t testing.TB) (untouched func(testing.TB)) {
	t.Helper()
	file := filepath.Join(s.dir, "foreign.xml")
	xml := `<domain type="qemu"><name>` + Foreign + `</name><memory unit="MiB">16</memory><os><type arch="x86_64">hvm</type></os></domain>`
	if err := os.WriteFile(file, []byte(xml), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Virsh(t, "define", file)
	s.Virsh(t, "start", Foreign)
	s.Virsh(t, "vol-create-as", s.Pool, Foreign, "1M")
	look := func(t testing.TB) string {
		t.Helper()
		pid, err := os.ReadFile(filepath.Join(s.pidPath, Foreign+".pid"))
		if err != nil {
			t.Error(err)
		}
		info, err := os.Stat(filepath.Join(s.PoolPath, Foreign))
		if err != nil {
			t.Error(err)
			return ""
		}
		return fmt.Sprintf("%s%s%s%d bytes of %s", s.Virsh(t, "domstate", Foreign), s.Virsh(t, "domuuid", Foreign), pid, info.Size(), info.ModTime())
	}
	before := look(t)
	return func(t testing.TB) {
		t.Helper()
		if now := look(t); now != before {
			t.Errorf("what is another's was\n%s\nand is\n%s", before, now)
		}
	}
}
