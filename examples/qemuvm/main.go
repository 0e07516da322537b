//go:build linux

// Command qemuvm is a provider plugin of Solstice, complete and by itself: virtual
// machines that are QEMU processes, without libvirt. It is the example of
// docs/writing-a-vm-provider.md, to be copied.
//
// A machine is a directory below --root, and a QEMU process that outlives this
// one. Nothing else is kept, so that a plugin that was killed is simply started
// again, and goes on.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/solstice-ci/solstice-go/vmprovider/remotevm"
)

const version = "0.1.0"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "qemuvm:", err)
		os.Exit(1)
	}
}

// run is the plugin, until ctx ends or, where that is a pipe, stdin does.
func run(ctx context.Context, args []string, stdin *os.File) error {
	flags := flag.NewFlagSet("qemuvm", flag.ContinueOnError)
	listen := flags.String("listen", "", "`address` to serve at: unix:PATH, or HOST:PORT with --tls-…")
	cert := flags.String("tls-cert", "", "`file` with the server's certificate, PEM")
	key := flags.String("tls-key", "", "`file` with its key, PEM")
	ca := flags.String("tls-ca", "", "`file` with the authority of clients' certificates, PEM")
	var cfg Config
	flags.StringVar(&cfg.Root, "root", "/var/lib/solstice/qemuvm", "`directory` of the machines")
	flags.StringVar(&cfg.Accelerator, "accelerator", "kvm", "kvm, or tcg, which emulates")
	flags.IntVar(&cfg.CPUs, "cpus", 1, "of a machine that asks for no number")
	memory := flags.Int64("memory-mb", 1024, "of a machine that asks for no size")
	flags.IntVar(&cfg.Max, "max", 0, "machines at once; 0: any number")
	if err := flags.Parse(args); err != nil {
		return err
	}
	cfg.MemoryBytes = *memory << 20
	tlsConfig, err := tlsOf(*cert, *key, *ca)
	if err != nil {
		return err
	}

	p, err := New(cfg)
	if err != nil {
		return err
	}
	defer p.Close()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if info, err := stdin.Stat(); err == nil && info.Mode()&os.ModeNamedPipe != 0 {
		go func() { // the pipe ends with the orchestrator that started this, however that ends
			_, _ = io.Copy(io.Discard, stdin)
			stop()
		}()
	}
	server := remotevm.NewServer(p, remotevm.ServerOptions{Name: "qemuvm", Version: version})
	return remotevm.Serve(ctx, *listen, server, tlsConfig)
}

// tlsOf is nil without files, as for a Unix socket.
func tlsOf(cert, key, ca string) (*tls.Config, error) {
	if cert == "" && key == "" && ca == "" {
		return nil, nil
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	clients := x509.NewCertPool()
	if !clients.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: no certificates", ca)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{pair}, ClientCAs: clients, ClientAuth: tls.RequireAndVerifyClientCert,
		MinVersion: tls.VersionTLS13,
	}, nil
}
