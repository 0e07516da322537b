// Package storage holds the flag groups of a daemon that keep state: database,
// blobs and queue. Each opens what it describes. They are apart from package
// daemon so that programs without them do not link a database driver.
package storage

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/uptrace/bun"
	"go.opentelemetry.io/otel"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/blobstore/fsblob"
	"github.com/solstice-ci/solstice-go/blobstore/s3blob"
	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/amqpqueue"
	"github.com/solstice-ci/solstice-go/queue/sqlqueue"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

// Database are the flags of the database.
type Database struct {
	DatabaseURL          string `group:"Database" env:"DATABASE_URL" placeholder:"URL" help:"postgres://USER:PASSWORD@HOST/NAME or sqlite:FILE. Default: SQLite in the state directory."`
	DatabaseURLFile      string `group:"Database" env:"DATABASE_URL_FILE" placeholder:"FILE" help:"File with the database's URL."`
	DBPoolMaxSize        int    `group:"Database" name:"db-pool-max-size" env:"DB_POOL_MAX_SIZE" default:"16" help:"Most connections at once."`
	DBPoolTimeoutMS      int    `group:"Database" name:"db-pool-timeout-ms" env:"DB_POOL_TIMEOUT_MS" default:"5000" help:"Longest wait for a connection."`
	DBStatementTimeoutMS int    `group:"Database" name:"db-statement-timeout-ms" env:"DB_STATEMENT_TIMEOUT_MS" default:"0" help:"Longest time for a statement; 0: no limit."`
}

// Open connects, and returns once the database answered. Without a URL it is
// SQLite, in the file solstice.db of stateDir. A nil log discards.
func (d Database) Open(ctx context.Context, stateDir string, log *slog.Logger) (*bun.DB, error) {
	url, err := d.url(stateDir)
	if err != nil {
		return nil, err
	}
	if d.DBPoolMaxSize < 1 || d.DBPoolTimeoutMS < 1 || d.DBStatementTimeoutMS < 0 {
		return nil, usage("the sizes and timeouts of the database must be positive", "correct --db-pool-max-size, --db-pool-timeout-ms or --db-statement-timeout-ms")
	}
	db, err := sqldb.Open(ctx, url, sqldb.Options{
		MaxConns:         d.DBPoolMaxSize,
		PoolTimeout:      time.Duration(d.DBPoolTimeoutMS) * time.Millisecond,
		StatementTimeout: time.Duration(d.DBStatementTimeoutMS) * time.Millisecond,
		Logger:           log,
		TracerProvider:   otel.GetTracerProvider(),
	})
	if err != nil {
		return nil, &daemon.Problem{What: "cannot open the database", Err: err, Advice: databaseAdvice(err)}
	}
	return db, nil
}

func (d Database) url(stateDir string) (string, error) {
	url, err := daemon.Secret("database-url", d.DatabaseURL, d.DatabaseURLFile)
	switch {
	case err != nil:
		return "", err
	case url != "":
		return url, nil
	case stateDir == "":
		return "", usage("there is neither a database nor a state directory for one", "give --database-url or --state-dir")
	}
	return "sqlite:" + filepath.Join(stateDir, "solstice.db"), nil
}

// Dir is the directory of a SQLite file; empty where the database is elsewhere.
func (d Database) Dir(stateDir string) (string, error) {
	url, err := d.url(stateDir)
	if err != nil {
		return "", err
	}
	file, ok := strings.CutPrefix(url, "sqlite:")
	if !ok || file == ":memory:" {
		return "", nil
	}
	return filepath.Dir(file), nil
}

func databaseAdvice(err error) string {
	for _, known := range []struct {
		is     error
		advice string
	}{
		{sqldb.ErrURL, "give --database-url as postgres://USER:PASSWORD@HOST:5432/NAME or sqlite:FILE"},
		{sqldb.ErrHostNotFound, "the host in --database-url does not resolve: check its spelling and this machine's DNS"},
		{sqldb.ErrRefused, "nothing answers at host and port of --database-url: start PostgreSQL, or correct them"},
		{sqldb.ErrUnreachable, "the host in --database-url does not answer: check the address, and firewalls on the way"},
		{sqldb.ErrAuth, "correct user and password in --database-url, or what pg_hba.conf on the server allows"},
		{sqldb.ErrNoDatabase, "create the database (createdb NAME), or correct its name in --database-url"},
		{sqldb.ErrTLS, "check sslmode and sslrootcert in --database-url against what the server offers"},
		{sqldb.ErrFile, "check that the file is a SQLite database, and owner and mode of it and its directory"},
		{sqldb.ErrPoolTimeout, "another program holds the database: stop it, or raise --db-pool-timeout-ms"},
	} {
		if errors.Is(err, known.is) {
			return known.advice
		}
	}
	return ""
}

// Blobs are the flags of the blob store: a bucket where one is named, otherwise
// a directory.
type Blobs struct {
	BlobFSRoot             string `group:"Storage" name:"blob-fs-root" env:"BLOB_FS_ROOT" placeholder:"DIR" help:"Directory for logs and other large objects. Default: blobs in the state directory."`
	S3Bucket               string `group:"Storage" name:"s3-bucket" env:"S3_BUCKET" placeholder:"NAME" help:"Bucket for logs and other large objects, instead of a directory. It must exist."`
	S3Endpoint             string `group:"Storage" name:"s3-endpoint" env:"S3_ENDPOINT" placeholder:"URL" help:"Where the S3 service is, such as https://s3.example.com:9000. Default: AWS."`
	S3Prefix               string `group:"Storage" name:"s3-prefix" env:"S3_PREFIX" placeholder:"PATH" help:"Part of the bucket to use, such as ci/main. Default: all of it."`
	S3CA                   string `group:"Storage" name:"s3-ca" env:"S3_CA" placeholder:"FILE" help:"PEM file of the authorities that may sign the S3 service's certificate. Default: the system's."`
	AWSRegion              string `group:"Storage" name:"aws-region" env:"AWS_REGION" default:"us-east-1" placeholder:"NAME" help:"Region of the bucket, also of services other than AWS."`
	AWSAccessKeyID         string `group:"Storage" name:"aws-access-key-id" env:"AWS_ACCESS_KEY_ID" placeholder:"ID" help:"Access key for the bucket. Default: the role of this machine."`
	AWSSecretAccessKey     string `group:"Storage" name:"aws-secret-access-key" env:"AWS_SECRET_ACCESS_KEY" placeholder:"KEY" help:"Secret key that belongs to it."`
	AWSSecretAccessKeyFile string `group:"Storage" name:"aws-secret-access-key-file" env:"AWS_SECRET_ACCESS_KEY_FILE" placeholder:"FILE" help:"File with the secret key."`
}

// Open opens the store, and returns once a bucket has answered. Without a bucket
// or a directory it is the directory blobs of stateDir. A nil log discards.
func (b Blobs) Open(ctx context.Context, stateDir string, log *slog.Logger) (blobstore.Store, error) {
	if b.S3Bucket != "" {
		return b.openBucket(ctx, log)
	}
	if b.S3Endpoint != "" || b.S3Prefix != "" || b.S3CA != "" {
		return nil, usage("an S3 service is described, but no bucket", "give --s3-bucket")
	}
	dir := b.BlobFSRoot
	if dir == "" {
		if stateDir == "" {
			return nil, usage("there is neither a directory for blobs nor a state directory", "give --blob-fs-root, --s3-bucket or --state-dir")
		}
		dir = filepath.Join(stateDir, "blobs")
	}
	s, err := fsblob.Open(dir, fsblob.Options{})
	if err != nil {
		return nil, &daemon.Problem{What: "cannot open the blob store", Err: err}
	}
	return s, nil
}

func (b Blobs) openBucket(ctx context.Context, log *slog.Logger) (blobstore.Store, error) {
	if b.BlobFSRoot != "" {
		return nil, usage("blobs cannot be both in a directory and in a bucket", "give --blob-fs-root or --s3-bucket")
	}
	secret, err := daemon.Secret("aws-secret-access-key", b.AWSSecretAccessKey, b.AWSSecretAccessKeyFile)
	if err != nil {
		return nil, err
	}
	if (secret == "") != (b.AWSAccessKeyID == "") {
		return nil, usage("the access key of the bucket needs its secret key, and the other way round",
			"give --aws-access-key-id and --aws-secret-access-key or its file, or neither, for the role of this machine")
	}
	o := s3blob.Options{
		Endpoint: b.S3Endpoint, Bucket: b.S3Bucket, Region: b.AWSRegion, Prefix: b.S3Prefix,
		AccessKey: b.AWSAccessKeyID, SecretKey: secret, Logger: log,
		TracerProvider: otel.GetTracerProvider(), MeterProvider: otel.GetMeterProvider(),
	}
	if b.S3CA != "" {
		pool, err := daemon.LoadPool(b.S3CA)
		if err != nil {
			return nil, &daemon.Problem{What: "cannot use the file of --s3-ca", Err: err}
		}
		o.TLS = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	s, err := s3blob.Open(ctx, o)
	if err != nil {
		return nil, &daemon.Problem{What: "cannot open the bucket for blobs", Err: err, Advice: bucketAdvice(err)}
	}
	return s, nil
}

func bucketAdvice(err error) string {
	for _, known := range []struct {
		is     error
		advice string
	}{
		{s3blob.ErrEndpoint, "give --s3-endpoint as https://HOST or http://HOST:PORT, without the bucket"},
		{s3blob.ErrHostNotFound, "the host in --s3-endpoint does not resolve: check its spelling and this machine's DNS"},
		{s3blob.ErrRefused, "nothing answers at host and port of --s3-endpoint: start the S3 service, or correct them"},
		{s3blob.ErrTLS, "give the service's authority with --s3-ca, or check http:// against https:// in --s3-endpoint"},
		{s3blob.ErrNoCredentials, "give --aws-access-key-id and --aws-secret-access-key, or a role to this machine"},
		{s3blob.ErrAuth, "correct --aws-access-key-id and --aws-secret-access-key (or its file)"},
		{s3blob.ErrClock, "set this machine's clock, or the service's"},
		{s3blob.ErrRegion, "give --aws-region as the region that the service or the bucket is in"},
		{s3blob.ErrNoBucket, "create the bucket, or correct --s3-bucket"},
		{s3blob.ErrDenied, "allow these credentials to list, read, write and delete in the bucket, also multipart uploads; or correct --s3-bucket"},
		{s3blob.ErrNotS3, "what answers at --s3-endpoint is no S3 service: check host, port, and http:// against https://"},
		{s3blob.ErrThrottled, "the service asks for fewer requests: start again later"},
		{s3blob.ErrUnreachable, "the host in --s3-endpoint does not answer: check the address, and firewalls on the way"},
		{blobstore.ErrInvalid, "correct --s3-bucket (3 to 63 small letters, digits, dots and hyphens) or --s3-prefix"},
	} {
		if errors.Is(err, known.is) {
			return known.advice
		}
	}
	return ""
}

// Broker are the flags of the queue: RabbitMQ where one is named, otherwise the
// database.
type Broker struct {
	AMQPURL      string `group:"Queue" name:"amqp-url" env:"AMQP_URL" placeholder:"URL" help:"RabbitMQ, as amqp://USER:PASSWORD@HOST:5672/VHOST or amqps://…, with %2f for the virtual host /. Default: the queue is in the database."`
	AMQPURLFile  string `group:"Queue" name:"amqp-url-file" env:"AMQP_URL_FILE" placeholder:"FILE" help:"File with RabbitMQ's URL."`
	AMQPPrefetch int    `group:"Queue" name:"amqp-prefetch" env:"AMQP_PREFETCH" default:"64" help:"Most messages that a reader has in hand."`
	AMQPExchange string `group:"Queue" name:"amqp-exchange" env:"AMQP_EXCHANGE" default:"solstice.jobs" placeholder:"NAME" help:"Exchange that messages are published to."`
	AMQPQueue    string `group:"Queue" name:"amqp-queue" env:"AMQP_QUEUE" default:"solstice" placeholder:"PREFIX" help:"What the names of queues begin with: PREFIX.TOPIC.v1."`
	AMQPCA       string `group:"Queue" name:"amqp-ca" env:"AMQP_CA" placeholder:"FILE" help:"PEM file of the authorities that may sign RabbitMQ's certificate. Default: the system's."`
	AMQPCert     string `group:"Queue" name:"amqp-cert" env:"AMQP_CERT" placeholder:"FILE" help:"PEM file of the certificate to show to RabbitMQ."`
	AMQPKey      string `group:"Queue" name:"amqp-key" env:"AMQP_KEY" placeholder:"FILE" help:"PEM file of that certificate's key."`
}

// Open opens the queue, and returns once a broker has answered. Without one it
// is kept in db. A nil log discards.
func (b Broker) Open(ctx context.Context, db *bun.DB, log *slog.Logger) (queue.Queue, error) {
	url, err := daemon.Secret("amqp-url", b.AMQPURL, b.AMQPURLFile)
	if err != nil {
		return nil, err
	}
	if url == "" {
		if b.AMQPCA != "" || b.AMQPCert != "" || b.AMQPKey != "" {
			return nil, usage("certificates for RabbitMQ are given, but no URL of it", "give --amqp-url")
		}
		q, err := sqlqueue.New(ctx, db, sqlqueue.Options{Logger: log})
		if err != nil {
			return nil, &daemon.Problem{What: "cannot open the queue in the database", Err: err, Advice: databaseAdvice(err)}
		}
		return q, nil
	}
	if (b.AMQPCert == "") != (b.AMQPKey == "") {
		return nil, usage("a certificate for RabbitMQ needs its key", "give both --amqp-cert and --amqp-key")
	}
	if b.AMQPPrefetch < 1 {
		return nil, usage("--amqp-prefetch must be positive", "correct --amqp-prefetch")
	}
	o := amqpqueue.Options{
		URL: url, Exchange: b.AMQPExchange, Prefix: b.AMQPQueue, Prefetch: b.AMQPPrefetch, ConnectionName: "solstice", Logger: log,
		TracerProvider: otel.GetTracerProvider(), MeterProvider: otel.GetMeterProvider(),
	}
	if b.AMQPCA != "" || b.AMQPCert != "" {
		o.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	if b.AMQPCA != "" {
		if o.TLS.RootCAs, err = daemon.LoadPool(b.AMQPCA); err != nil {
			return nil, &daemon.Problem{What: "cannot use the file of --amqp-ca", Err: err}
		}
	}
	if b.AMQPCert != "" {
		pair, err := tls.LoadX509KeyPair(b.AMQPCert, b.AMQPKey)
		if err != nil {
			return nil, &daemon.Problem{What: "cannot use the files of --amqp-cert and --amqp-key", Err: err}
		}
		o.TLS.Certificates = []tls.Certificate{pair}
	}
	q, err := amqpqueue.Open(ctx, o)
	if err != nil {
		return nil, &daemon.Problem{What: "cannot open the queue in RabbitMQ", Err: err, Advice: brokerAdvice(err)}
	}
	return q, nil
}

func brokerAdvice(err error) string {
	for _, known := range []struct {
		is     error
		advice string
	}{
		{amqpqueue.ErrURL, "give --amqp-url as amqp://USER:PASSWORD@HOST:5672/VHOST, with %2f for the virtual host /"},
		{amqpqueue.ErrHostNotFound, "the host in --amqp-url does not resolve: check its spelling and this machine's DNS"},
		{amqpqueue.ErrRefused, "no RabbitMQ answers at host and port of --amqp-url: start it, or correct them (5672, with TLS 5671)"},
		{amqpqueue.ErrUnreachable, "the host in --amqp-url does not answer: check the address, and firewalls on the way"},
		{amqpqueue.ErrTLS, "check amqp:// against amqps:// in --amqp-url, and --amqp-ca, --amqp-cert and --amqp-key"},
		{amqpqueue.ErrAuth, "correct user and password in --amqp-url; RabbitMQ lets guest in from its own machine only"},
		{amqpqueue.ErrVHost, "create the virtual host (rabbitmqctl add_vhost), let the user in, or correct it in --amqp-url"},
		{amqpqueue.ErrPermission, "let the user configure, write and read (rabbitmqctl set_permissions)"},
		{amqpqueue.ErrTopology, "another program has exchanges or queues of these names: give --amqp-exchange and --amqp-queue others, or delete them"},
		{queue.ErrInvalid, "correct --amqp-exchange or --amqp-queue"},
	} {
		if errors.Is(err, known.is) {
			return known.advice
		}
	}
	return ""
}

func usage(what, advice string) error {
	return &daemon.ExitError{Code: daemon.ExitUsage, Err: &daemon.Problem{What: what, Advice: advice}}
}

// IsPostgres tells a database that several orchestrators can share from an
// embedded one.
func IsPostgres(db *bun.DB) bool { return sqldb.IsPostgres(db) }
