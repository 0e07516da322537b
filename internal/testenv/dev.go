package testenv

import (
	"context"
	"errors"
	"fmt"
)

// Dev is a set of servers for a developer.
type Dev struct {
	Variables []string // NAME=VALUE, as the daemons read them
	keepers   []*keeper
}

// StartDev starts a PostgreSQL, a RabbitMQ and an S3 server, with a database
// and a bucket. They end with this process, or with Close.
func StartDev(ctx context.Context) (_ *Dev, err error) {
	d := &Dev{}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	pg, err := newPostgres()
	if err != nil {
		return nil, err
	}
	d.keepers = append(d.keepers, pg.keeper)
	if err := pg.admin("CREATE DATABASE solstice"); err != nil {
		return nil, err
	}

	bin, err := findRabbitMQ()
	if err != nil {
		return nil, err
	}
	dir, err := d.dir("rabbitmq")
	if err != nil {
		return nil, err
	}
	rabbit, err := launchRabbitMQ(bin, dir, RabbitMQOptions{}, nil)
	if err != nil {
		return nil, err
	}

	program, err := findS3()
	if err != nil {
		return nil, err
	}
	if dir, err = d.dir("s3"); err != nil {
		return nil, err
	}
	s3, err := launchS3(program, dir)
	if err != nil {
		return nil, err
	}
	bucket, err := s3.bucket(ctx, "solstice")
	if err != nil {
		return nil, err
	}
	d.Variables = []string{
		"DATABASE_URL=" + pg.URL("solstice"),
		"AMQP_URL=" + rabbit.URL(""),
		"S3_ENDPOINT=" + bucket.Endpoint,
		"S3_BUCKET=" + bucket.Bucket,
		"AWS_REGION=" + bucket.Region,
		"AWS_ACCESS_KEY_ID=" + bucket.AccessKey,
		"AWS_SECRET_ACCESS_KEY=" + bucket.SecretKey,
		fmt.Sprintf("# RabbitMQ's management interface, guest/guest: http://%s", loopback(rabbit.HTTPPort)),
	}
	return d, nil
}

func (d *Dev) dir(name string) (string, error) {
	dir, k, err := keptDir(name)
	if err == nil {
		d.keepers = append(d.keepers, k)
	}
	return dir, err
}

// Close stops the servers and removes what they kept.
func (d *Dev) Close() error {
	var errs []error
	for _, k := range d.keepers {
		errs = append(errs, k.close())
	}
	return errors.Join(errs...)
}
