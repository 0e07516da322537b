// Command bareforge is a forge plugin of Solstice, complete and by itself: a
// directory of bare repositories, whose post-receive hook posts signed webhooks, and
// where statuses are files beside the commits. It is the example of
// docs/writing-a-forge.md, to be copied.
//
//	bareforge init --root DIR --url URL REPO    makes a repository with its hook
//	bareforge serve --root DIR --listen ADDRESS serves solstice.forge.v1
//	bareforge statuses --root DIR REPO COMMIT   prints what stands beside a commit
//	bareforge hook --root DIR --url URL         is what a post-receive hook runs
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/solstice-ci/solstice-go/forge/remoteforge"
)

const version = "0.1.0"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bareforge:", err)
		os.Exit(1)
	}
}

// run is one of the verbs.
func run(ctx context.Context, args []string, stdin *os.File, stdout io.Writer) error {
	if len(args) == 0 {
		return errors.New("want one of init, serve, statuses, hook")
	}
	verb := args[0]
	flags := flag.NewFlagSet("bareforge "+verb, flag.ContinueOnError)
	root := flags.String("root", "", "`directory` of the repositories")
	url := flags.String("url", "", "where webhooks are posted")
	listen := flags.String("listen", "", "`address` to serve at: unix:PATH, or HOST:PORT with --tls-…")
	cert := flags.String("tls-cert", "", "`file` with the server's certificate, PEM")
	key := flags.String("tls-key", "", "`file` with its key, PEM")
	ca := flags.String("tls-ca", "", "`file` with the authority of clients' certificates, PEM")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	f, err := Open(*root)
	if err != nil {
		return err
	}
	switch rest := flags.Args(); {
	case verb == "serve" && len(rest) == 0:
		tlsConfig, err := tlsOf(*cert, *key, *ca)
		if err != nil {
			return err
		}
		return serve(ctx, f, *listen, tlsConfig, stdin)
	case verb == "init" && len(rest) == 1:
		program, err := os.Executable()
		if err != nil {
			return err
		}
		return f.create(ctx, rest[0], *url, program)
	case verb == "hook" && len(rest) == 0:
		dir, err := os.Getwd() // git runs hooks of a bare repository in it
		if err != nil {
			return err
		}
		return f.hook(ctx, dir, *url, stdin)
	case verb == "statuses" && len(rest) == 2:
		all, err := f.Statuses(ctx, repoOf(rest[0]), rest[1])
		for _, s := range all {
			fmt.Fprintf(stdout, "%-10s %s: %s %s\n", s.State, s.Key, s.Description, s.TargetURL)
		}
		return err
	}
	return fmt.Errorf("%s %q: see the comment of the program", verb, flags.Args())
}

// serve is the plugin, until ctx ends or, where that is a pipe, stdin does.
func serve(ctx context.Context, f *Forge, listen string, tlsConfig *tls.Config, stdin *os.File) error {
	defer f.Close()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if info, err := stdin.Stat(); err == nil && info.Mode()&os.ModeNamedPipe != 0 {
		go func() { // the pipe ends with whoever started this, however that ends
			_, _ = io.Copy(io.Discard, stdin)
			stop()
		}()
	}
	server := remoteforge.NewServer(f, remoteforge.ServerOptions{
		Name: "bareforge", Version: version, Secret: f.Secret, Logger: slog.Default(),
	})
	return remoteforge.Serve(ctx, listen, server, tlsConfig)
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
