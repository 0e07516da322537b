package seed

import (
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// guestAgent says on the console what a real one needs.
const guestAgent = `#!/bin/sh
echo "agent: $*"
ls -l /var/lib/solstice/bootstrap.json
cat /var/lib/solstice/bootstrap.json
grep -l 'secret-[t]oken' /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null
echo "agent: done"
`

// TestGuest boots a real guest, which finds the seed on a CD-ROM's file system,
// fetches its agent from this test, and starts it. TestAgent has one from FAT.
func TestGuest(t *testing.T) {
	t.Parallel()
	image := testenv.MiniGuest(t)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/runner/linux/amd64" {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write([]byte(guestAgent))
	}))
	defer server.Close()
	_, port, err := net.SplitHostPort(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b := bootstrap()
	b.RunnerURL = "http://10.0.2.2:" + port + "/runner"
	sum := sha256.Sum256([]byte(guestAgent))
	b.AgentSHA256 = map[string]string{"linux/amd64": hex.EncodeToString(sum[:])}
	console := bootGuest(t, image, b, Options{Format: ISO})
	for _, want := range []string{
		"mini: seed \"sol-1\"\n", "solstice: starting the agent\n", "agent: --bootstrap /var/lib/solstice/bootstrap.json --poweroff\n",
		"-rw-------    1 0        0 ", `{"contacts":["10.0.2.2:50052","[fd00::1]:50052"],"ca":"`, `","token":"secret-token"}` + "\nagent: done\n",
	} {
		if !strings.Contains(console, want) {
			t.Errorf("the console does not show %q:\n%s", want, console)
		}
	}
}

// bootGuest runs a guest with a seed until it powers off, and returns what its
// console showed.
func bootGuest(t *testing.T, image string, b vmprovider.Bootstrap, o Options) (console string) {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "seed")
	if err := os.WriteFile(disk, build(t, b, o), 0o600); err != nil {
		t.Fatal(err)
	}
	g := testenv.StartQEMU(t, image, disk)
	g.Wait(t)
	return strings.ReplaceAll(g.Console(t), "\r", "")
}
