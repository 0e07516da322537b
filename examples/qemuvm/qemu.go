//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// imageSize checks an image, and gives the size of its disk. Its format is told,
// never probed, and it stands alone: what is in an image must not name other files.
func (p *Provider) imageSize(ctx context.Context, i vmprovider.Image) (int64, error) {
	if !filepath.IsAbs(i.Path) || i.Format != "raw" && i.Format != "qcow2" {
		return 0, fmt.Errorf("%w: image %q of format %q: want an absolute path, raw or qcow2", vmprovider.ErrInvalid, i.Path, i.Format)
	}
	out, err := p.run(ctx, p.qemuImg, "info", "--output=json", "-f", i.Format, i.Path)
	var info struct {
		Size     int64  `json:"virtual-size"`
		Backing  string `json:"backing-filename"`
		Specific struct {
			Data struct {
				File string `json:"data-file"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err == nil {
		err = json.Unmarshal(out, &info)
	}
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	if err == nil && info.Backing+info.Specific.Data.File != "" {
		err = errors.New("it needs another file")
	}
	if err != nil {
		return 0, fmt.Errorf("%w: image %s: %w", vmprovider.ErrInvalid, i.Path, err)
	}
	return info.Size, nil
}

// overlay makes the machine's disk.
func (p *Provider) overlay(ctx context.Context, m *machine, s vmprovider.Spec) error {
	_, err := p.run(ctx, p.qemuImg, "create", "-q", "-f", "qcow2", "-F", s.Image.Format, "-b", s.Image.Path,
		m.path(diskFile), strconv.FormatInt(s.DiskBytes, 10))
	return err
}

// run runs a tool that is quick, with no environment.
func (p *Provider) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...) //nolint:gosec // a program that New found
	cmd.Env = []string{}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", filepath.Base(name), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}

// arguments of QEMU. What the guest does ends nothing by itself: a guest that
// powers off or panics stays, paused, and QMP says which it was.
func (p *Provider) arguments(m *machine, s vmprovider.Spec) []string {
	args := []string{
		"-name", m.ID, "-pidfile", m.path(pidFile),
		"-nodefaults", "-no-user-config", "-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", "q35", "-accel", p.cfg.Accelerator,
		"-smp", strconv.Itoa(s.CPUs), "-m", fmt.Sprintf("%dk", s.MemoryBytes>>10),
		"-action", "reboot=shutdown,shutdown=pause,panic=pause", "-device", "pvpanic",
		"-chardev", "file,id=console,path=" + m.path(consoleFile), "-serial", "chardev:console",
		"-chardev", "socket,id=qmp,server=on,wait=off,path=" + m.path(qmpFile), "-mon", "chardev=qmp,mode=control",
		"-blockdev", blockdev("disk", "qcow2", m.path(diskFile), false), "-device", "virtio-blk-pci,drive=disk,bootindex=1",
		"-blockdev", blockdev("seed", "raw", m.path(seedFile), true), "-device", "virtio-blk-pci,drive=seed",
		"-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
		"-device", "virtio-rng-pci",
	}
	if p.cfg.Accelerator == "kvm" {
		args = append(args, "-cpu", "host")
	}
	return args
}

func blockdev(node, format, path string, readOnly bool) string {
	b, _ := json.Marshal(map[string]any{ // of these it does not fail
		"node-name": node, "driver": format, "read-only": readOnly,
		"file": map[string]any{"driver": "file", "filename": path},
	})
	return string(b)
}

// start starts QEMU so that it outlives this process: in a session of its own,
// with no pipe to it. It returns once QEMU answers.
func (p *Provider) start(ctx context.Context, m *machine, s vmprovider.Spec) error {
	log, err := os.Create(m.path(logFile))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := &exec.Cmd{
		Path: p.qemu, Args: append([]string{p.qemu}, p.arguments(m, s)...), Env: []string{},
		Stdout: log, Stderr: log,
		ExtraFiles:  []*os.File{m.alive}, // it knows nothing of it, and holds the lock as long as it lives
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	err = cmd.Start()
	m.dropAlive()
	if err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() { // for as long as this process lives: a child that has ended wants to be waited for
		_ = cmd.Wait()
		close(ended)
	}()
	for {
		if _, err := m.ask(ctx); err == nil {
			return nil
		}
		select {
		case <-ended:
			said, _ := os.ReadFile(m.path(logFile))
			return fmt.Errorf("QEMU ended: %s", bytes.TrimSpace(said))
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// answerTimeout bounds the wait for a QEMU that does not answer.
const answerTimeout = 2 * time.Second

// status of a machine that was started.
func (m *machine) status(ctx context.Context) (_ vmprovider.State, reason string) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	for held(m.path(aliveFile)) {
		switch status, err := m.ask(ctx); {
		case err != nil && ctx.Err() == nil: // somebody else is asking, or it has just ended
			select {
			case <-ctx.Done():
			case <-time.After(5 * time.Millisecond):
			}
		case err != nil || status == "running":
			return vmprovider.StateRunning, "" // one that does not answer has a process, memory and a disk
		case status == "shutdown":
			return vmprovider.StateStopped, "the guest powered off"
		case status == "guest-panicked":
			return vmprovider.StateStopped, "the guest panicked"
		default:
			return vmprovider.StateStopped, "QEMU says: " + status
		}
	}
	return vmprovider.StateStopped, "QEMU has ended, or was killed"
}

// ask asks QEMU, which serves one client at a time, for the machine's status
// (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html#qapidoc-query-status).
func (m *machine) ask(ctx context.Context) (string, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", m.path(qmpFile))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })()
	if _, err := conn.Write([]byte(`{"execute":"qmp_capabilities"}{"execute":"query-status","id":1}`)); err != nil {
		return "", err
	}
	for dec := json.NewDecoder(conn); ; {
		var answer struct {
			ID     int `json:"id"`
			Return struct {
				Status string `json:"status"`
			} `json:"return"`
		}
		if err := dec.Decode(&answer); err != nil {
			return "", err
		}
		if answer.ID == 1 { // not the greeting, an event or the other answer
			return answer.Return.Status, nil
		}
	}
}

// kill ends QEMU, and returns once no process of the machine is left: not even one
// that was being started when its provider was killed.
func (m *machine) kill(ctx context.Context) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := m.signal()
		if err == nil && !held(m.path(aliveFile)) {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

func (m *machine) signal() error {
	b, err := os.ReadFile(m.path(pidFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return nil // not written yet
	}
	process, err := os.FindProcess(pid) // a pidfd: from here on it means one process, whoever has the number
	if err != nil {
		return err
	}
	defer func() { _ = process.Release() }()
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !bytes.Contains(args, []byte("\x00"+m.path(pidFile)+"\x00")) {
		return nil // ended long ago, and the number is another's
	}
	if err := process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}
