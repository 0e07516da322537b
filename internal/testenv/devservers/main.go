// Command devservers starts a PostgreSQL, a RabbitMQ and an S3 server for a
// developer, writes the variables by which the daemons find them to a file
// (mode 0600, first argument), and stops everything when it is told to end.
// .mise/tasks/dev/up runs it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/solstice-ci/solstice-go/internal/testenv"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: devservers FILE")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "devservers:", err)
		os.Exit(1)
	}
}

func run(file string) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	d, err := testenv.StartDev(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := d.Close(); err == nil {
			err = cerr
		}
		_ = os.Remove(file)
	}()
	tmp := file + ".new"
	if err := os.WriteFile(tmp, []byte(strings.Join(d.Variables, "\n")+"\n"), 0o600); err != nil {
		return err
	}
	if err := os.Rename(tmp, file); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}
