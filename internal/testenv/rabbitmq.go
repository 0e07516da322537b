package testenv

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// errNoRabbitMQ: the programs are not installed.
var errNoRabbitMQ = errors.New("RabbitMQ's server programs were not found (Debian: apt-get install rabbitmq-server)")

// rabbitBin holds the programs themselves; those on the PATH are wrappers that
// insist on an account.
var rabbitBin = []string{"/usr/lib/rabbitmq/bin", "/opt/homebrew/opt/rabbitmq/sbin", "/usr/local/opt/rabbitmq/sbin"}

// RabbitMQServer is a broker with a directory of its own. Its user is guest,
// with the password guest.
type RabbitMQServer struct {
	Bin, Dir string
	Port     int // AMQP
	TLSPort  int // AMQP over TLS; 0: not served
	HTTPPort int // management
	DistPort int
	EpmdPort int
	CtlPort  int
}

// RabbitMQOptions of a private broker.
type RabbitMQOptions struct {
	Config   string // further lines of rabbitmq.conf
	Advanced string // advanced.config
	// TLS has the broker serve amqps too, with a certificate of that authority
	// for 127.0.0.1 and localhost, and ask clients for one of the same.
	TLS *Authority
}

var sharedRabbit = sync.OnceValues(func() (*RabbitMQServer, error) {
	bin, err := findRabbitMQ()
	if err != nil {
		return nil, err
	}
	return share("rabbitmq", func(dir string) (*RabbitMQServer, error) {
		return launchRabbitMQ(bin, dir, RabbitMQOptions{}, nil)
	})
})

// RabbitMQ returns the URL of a fresh virtual host on the broker that the tests
// of this run share.
func RabbitMQ(t testing.TB) string {
	t.Helper()
	return SharedRabbitMQ(t).VHost(t)
}

// SharedRabbitMQ is the broker that the tests of this run share: it may be
// asked, and not be killed, paused or restarted.
func SharedRabbitMQ(t testing.TB) *RabbitMQServer {
	t.Helper()
	s, err := sharedRabbit()
	if err != nil {
		missingRabbitMQ(t, err)
	}
	return s
}

// StartRabbitMQ starts a broker that only this test uses, and so may kill,
// pause and restart. It takes about ten seconds.
func StartRabbitMQ(t testing.TB, o RabbitMQOptions) *RabbitMQServer {
	t.Helper()
	bin, err := findRabbitMQ()
	if err != nil {
		missingRabbitMQ(t, err)
	}
	var s *RabbitMQServer
	private(t, "rabbitmq", func(dir string) error {
		var files *Certificate
		if o.TLS != nil {
			files = o.TLS.Issue(t, "rabbitmq", "127.0.0.1", "localhost")
		}
		s, err = launchRabbitMQ(bin, dir, o, files)
		return err
	})
	return s
}

func missingRabbitMQ(t testing.TB, err error) {
	t.Helper()
	if errors.Is(err, errNoRabbitMQ) {
		Missing(t, "RabbitMQ", err.Error())
	}
	t.Fatalf("start RabbitMQ: %v", err)
}

func findRabbitMQ() (string, error) {
	for _, dir := range rabbitBin {
		if _, err := os.Stat(filepath.Join(dir, "rabbitmq-server")); err == nil {
			if _, err := exec.LookPath("epmd"); err == nil {
				return dir, nil
			}
		}
	}
	return "", errNoRabbitMQ
}

func launchRabbitMQ(bin, dir string, o RabbitMQOptions, cert *Certificate) (*RabbitMQServer, error) {
	ports, err := freePorts(6)
	if err != nil {
		return nil, err
	}
	s := &RabbitMQServer{Bin: bin, Dir: dir, Port: ports[0], HTTPPort: ports[1], DistPort: ports[2], EpmdPort: ports[3], CtlPort: ports[4]}
	conf := fmt.Sprintf(`disk_free_limit.absolute = 50MB
vm_memory_high_watermark.absolute = 2GB
management.tcp.ip = 127.0.0.1
management.tcp.port = %d
management_agent.disable_metrics_collector = true
`, s.HTTPPort)
	if cert != nil {
		s.TLSPort = ports[5]
		conf += fmt.Sprintf(`listeners.ssl.default = 127.0.0.1:%d
ssl_options.cacertfile = %s
ssl_options.certfile = %s
ssl_options.keyfile = %s
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
`, s.TLSPort, cert.CA, cert.Cert, cert.Key)
	}
	files := map[string]string{"rabbitmq.conf": conf + o.Config + "\n", "enabled_plugins": "[rabbitmq_management].\n"}
	if o.Advanced != "" {
		files["advanced.config"] = o.Advanced + "\n"
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			return nil, err
		}
	}
	// Started by us and in the foreground: one that the broker starts outlives it.
	if err := spawn(dir, "epmd", s.env(), "epmd", "-port", fmt.Sprint(s.EpmdPort), "-address", "127.0.0.1"); err != nil {
		return nil, err
	}
	if err := await(dir, "epmd.pid", func(ctx context.Context) error { return dial(ctx, s.EpmdPort) }, "epmd.log"); err != nil {
		return nil, err
	}
	return s, s.start()
}

// env is the environment of the broker's programs, which know no other way to
// be told these things.
func (s *RabbitMQServer) env() []string {
	in := func(name string) string { return filepath.Join(s.Dir, name) }
	return []string{
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin:/opt/homebrew/bin", "LC_ALL=C.UTF-8", "HOME=" + in("home"),
		"RABBITMQ_NODENAME=" + s.node(), "RABBITMQ_NODE_IP_ADDRESS=127.0.0.1", fmt.Sprint("RABBITMQ_NODE_PORT=", s.Port),
		fmt.Sprint("RABBITMQ_DIST_PORT=", s.DistPort), fmt.Sprint("ERL_EPMD_PORT=", s.EpmdPort), "ERL_EPMD_ADDRESS=127.0.0.1",
		"RABBITMQ_MNESIA_BASE=" + in("mnesia"), "RABBITMQ_LOG_BASE=" + in("log"), "RABBITMQ_PID_FILE=" + in("broker.pid"),
		"RABBITMQ_CONF_ENV_FILE=/dev/null", "RABBITMQ_CONFIG_FILE=" + in("rabbitmq.conf"), "RABBITMQ_ADVANCED_CONFIG_FILE=" + in("advanced.config"),
		"RABBITMQ_ENABLED_PLUGINS_FILE=" + in("enabled_plugins"),
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=-kernel inet_dist_use_interface {127,0,0,1}",
		fmt.Sprint("RABBITMQ_CTL_DIST_PORT_MIN=", s.CtlPort), fmt.Sprint("RABBITMQ_CTL_DIST_PORT_MAX=", s.CtlPort),
	}
}

func (s *RabbitMQServer) node() string { return fmt.Sprintf("t%d@localhost", s.Port) }

// start returns once the broker serves AMQP and its management interface.
func (s *RabbitMQServer) start() error {
	if err := os.MkdirAll(filepath.Join(s.Dir, "home"), 0o700); err != nil {
		return err
	}
	if err := os.Remove(s.pidFile()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// Its script runs the broker as a child, which writes a pid file of its own.
	if err := spawn(s.Dir, "script", s.env(), filepath.Join(s.Bin, "rabbitmq-server")); err != nil {
		return err
	}
	return await(s.Dir, "script.pid", s.probe, "script.log")
}

func (s *RabbitMQServer) probe(ctx context.Context) error {
	for _, port := range []int{s.Port, s.TLSPort} {
		if port == 0 {
			continue
		}
		if err := dial(ctx, port); err != nil {
			return err
		}
	}
	if err := s.greet(ctx); err != nil {
		return err
	}
	return s.manage(ctx, http.MethodGet, "/overview", nil, nil)
}

// greet sends a protocol header with a version that the broker does not speak:
// it answers with its own, or, being ready, begins the handshake.
func (s *RabbitMQServer) greet(ctx context.Context) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", loopback(s.Port))
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if _, err := c.Write([]byte("AMQP\x00\x00\x09\x01")); err != nil {
		return err
	}
	var first [1]byte
	if _, err := io.ReadFull(c, first[:]); err != nil {
		return err
	}
	if first[0] != 1 {
		return fmt.Errorf("the broker began with %#x", first[0])
	}
	return nil
}

func dial(ctx context.Context, port int) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", loopback(port))
	if err != nil {
		return err
	}
	return c.Close()
}

// manage calls the management interface; in and out are JSON, nil for none.
func (s *RabbitMQServer) manage(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+loopback(s.HTTPPort)+"/api"+path, body)
	if err != nil {
		return err
	}
	req.SetBasicAuth("guest", "guest")
	req.Header.Set("Content-Type", "application/json")
	resp, err := management.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, b)
	}
	if out != nil {
		return json.Unmarshal(b, out)
	}
	return nil
}

// management keeps no connections, which a check for leaked goroutines would
// find, and goes through no proxy.
var management = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

// Manage calls the management interface (path below /api) and fails the test
// where that fails; in and out are JSON, nil for none.
func (s *RabbitMQServer) Manage(t testing.TB, method, path string, in, out any) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := s.manage(ctx, method, path, in, out); err != nil {
		t.Fatalf("RabbitMQ's management: %v", err)
	}
}

// URL of a virtual host; empty means the default one.
func (s *RabbitMQServer) URL(vhost string) string { return s.url("amqp", s.Port, vhost) }

// TLSURL is URL over TLS, where the broker was started with it.
func (s *RabbitMQServer) TLSURL(vhost string) string { return s.url("amqps", s.TLSPort, vhost) }

func (s *RabbitMQServer) url(scheme string, port int, vhost string) string {
	if vhost == "" {
		vhost = "/"
	}
	return fmt.Sprintf("%s://guest:guest@%s/%s", scheme, loopback(port), url.PathEscape(vhost))
}

// VHost makes an empty virtual host and returns its URL; it is deleted when the
// test ends.
func (s *RabbitMQServer) VHost(t testing.TB) string {
	t.Helper()
	name := "t" + strings.ToLower(rand.Text())
	s.Manage(t, http.MethodPut, "/vhosts/"+name, map[string]string{}, nil)
	s.Manage(t, http.MethodPut, "/permissions/"+name+"/guest", map[string]string{"configure": ".*", "write": ".*", "read": ".*"}, nil)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
		defer cancel()
		if err := s.manage(ctx, http.MethodDelete, "/vhosts/"+name, nil, nil); err != nil {
			t.Logf("delete the virtual host %s: %v", name, err) // the test may have killed the broker
		}
	})
	return s.URL(name)
}

// RabbitMQQueue is what the broker says about a queue.
type RabbitMQQueue struct {
	Name     string `json:"name"`
	Type     string `json:"type"`
	Durable  bool   `json:"durable"`
	Messages int    `json:"messages"` // ready and unsettled; as of up to 5 s ago
	State    string `json:"state"`
}

// Queues lists the queues of a virtual host given by URL.
func (s *RabbitMQServer) Queues(t testing.TB, vhostURL string) []RabbitMQQueue {
	t.Helper()
	var out []RabbitMQQueue
	s.Manage(t, http.MethodGet, "/queues/"+vhostOf(t, vhostURL)+"?disable_stats=true&enable_queue_totals=true", nil, &out)
	return out
}

// PurgeQueue drops the messages of a queue that wait.
func (s *RabbitMQServer) PurgeQueue(t testing.TB, vhostURL, queue string) {
	t.Helper()
	s.Manage(t, http.MethodDelete, "/queues/"+vhostOf(t, vhostURL)+"/"+url.PathEscape(queue)+"/contents", nil, nil)
}

// DeleteQueue deletes a queue, whoever uses it.
func (s *RabbitMQServer) DeleteQueue(t testing.TB, vhostURL, queue string) {
	t.Helper()
	s.Manage(t, http.MethodDelete, "/queues/"+vhostOf(t, vhostURL)+"/"+url.PathEscape(queue), nil, nil)
}

// DropMessages empties the durable queues of a virtual host and deletes the
// others, which are one connection's alone, with what is in them. It returns how
// many there were.
func (s *RabbitMQServer) DropMessages(t testing.TB, vhostURL string) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	vhost, n := vhostOf(t, vhostURL), 0
	for _, q := range s.Queues(t, vhostURL) {
		path := "/queues/" + vhost + "/" + url.PathEscape(q.Name)
		if q.Durable {
			path += "/contents"
		}
		if s.manage(ctx, http.MethodDelete, path, nil, nil) == nil { // or it is gone by now
			n++
		}
	}
	return n
}

// vhostOf is the virtual host of a URL, escaped for a path.
func vhostOf(t testing.TB, raw string) string {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimPrefix(u.EscapedPath(), "/")
}

func (s *RabbitMQServer) pidFile() string { return filepath.Join(s.Dir, "broker.pid") }

// Kill ends the broker with SIGKILL, as a crash would.
func (s *RabbitMQServer) Kill(t testing.TB) {
	t.Helper()
	kill(t, s.pidFile())
	if pid, err := readPID(filepath.Join(s.Dir, "script.pid")); err == nil { // ends with it
		waitGone(t, pid)
	}
}

// Start starts the broker again after Kill, and returns once it serves.
func (s *RabbitMQServer) Start(t testing.TB) {
	t.Helper()
	if err := s.start(); err != nil {
		t.Fatalf("start RabbitMQ: %v", err)
	}
	s.elect(t)
}

// elect has every quorum queue choose its leader, which on a single node some
// forget to do after a start: https://github.com/rabbitmq/rabbitmq-server/issues/10070.
func (s *RabbitMQServer) elect(t testing.TB) {
	t.Helper()
	s.Ctl(t, "eval", `[ra:trigger_election(amqqueue:get_pid(Q)) || Q <- rabbit_amqqueue:list(), amqqueue:get_type(Q) =:= rabbit_quorum_queue].`)
}

// Restart stops the broker in an orderly way and starts it.
func (s *RabbitMQServer) Restart(t testing.TB) {
	t.Helper()
	signal(t, syscall.SIGTERM, s.pidFile())
	for _, f := range []string{"broker.pid", "script.pid"} {
		if pid, err := readPID(filepath.Join(s.Dir, f)); err == nil {
			waitGone(t, pid)
		}
	}
	s.Start(t)
}

// Pause stops the broker with SIGSTOP: connections stay open and nothing
// answers. Resume lets it go on.
func (s *RabbitMQServer) Pause(t testing.TB) { signal(t, syscall.SIGSTOP, s.pidFile()) }

// Resume ends a Pause.
func (s *RabbitMQServer) Resume(t testing.TB) { signal(t, syscall.SIGCONT, s.pidFile()) }

// MemoryAlarm raises or ends the memory alarm, under which the broker does not
// read from connections that publish.
func (s *RabbitMQServer) MemoryAlarm(t testing.TB, on bool) {
	t.Helper()
	limit := "2GB"
	if on {
		limit = "1"
	}
	s.Ctl(t, "set_vm_memory_high_watermark", "absolute", limit)
}

// Ctl runs rabbitmqctl, which takes seconds.
func (s *RabbitMQServer) Ctl(t testing.TB, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(s.Bin, "rabbitmqctl"), append([]string{"-q", "-n", s.node()}, args...)...)
	cmd.Dir, cmd.Env = s.Dir, s.env()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("rabbitmqctl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}
