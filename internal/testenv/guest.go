package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

const miniGuest = "solstice/guests/mini.qcow2"

// MiniGuest returns the file of a small Linux guest, qcow2, for x86-64, which
// .mise/tasks/setup/guest builds. It must not be written to. With 256 MiB and no
// hardware virtualisation it is up in about 3 s: it says "mini: init" on its
// serial console, takes an address by DHCP, runs the user-data of the NoCloud
// seed on another of its disks, and powers off.
func MiniGuest(t testing.TB) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	file, err := filepath.EvalSymlinks(filepath.Join(cache, filepath.FromSlash(miniGuest)))
	if err != nil {
		Missing(t, "the mini guest", ".mise/tasks/setup/guest builds it: "+err.Error())
	}
	return file
}

// QEMUGuest is a guest that QEMU runs without hardware virtualisation and
// without libvirt.
type QEMUGuest struct{ dir string }

// StartQEMU boots a qcow2 image, to which nothing is written, with more raw disks
// to read, and a network in which the host's loopback is 10.0.2.2.
func StartQEMU(t testing.TB, image string, disks ...string) *QEMUGuest {
	t.Helper()
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		Missing(t, "QEMU", "Debian: apt-get install qemu-system-x86")
	}
	argv := []string{
		qemu, "-accel", "tcg", "-m", "256", "-nodefaults", "-nographic", "-serial", "stdio", "-no-reboot",
		"-drive", "file=" + image + ",format=qcow2,if=virtio,snapshot=on",
		"-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n", "-device", "virtio-rng-pci",
	}
	for _, d := range disks {
		argv = append(argv, "-drive", "file="+d+",format=raw,if=virtio,readonly=on")
	}
	g := &QEMUGuest{}
	private(t, "qemu", func(dir string) error {
		g.dir = dir
		return spawn(dir, "qemu", []string{"TMPDIR=" + dir, "PATH=/usr/bin:/bin"}, argv...)
	})
	return g
}

// Console is what the guest printed so far.
func (g *QEMUGuest) Console(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(g.dir, "qemu.log"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Wait waits until the guest has powered off or panicked.
func (g *QEMUGuest) Wait(t testing.TB) {
	t.Helper()
	pid, err := readPID(filepath.Join(g.dir, "qemu.pid"))
	if err != nil {
		t.Fatal(err)
	}
	waitGone(t, pid)
}
