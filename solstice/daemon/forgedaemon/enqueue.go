package forgedaemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"regexp"
	"strings"

	"github.com/google/uuid"
	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/forges"
	"github.com/solstice-ci/solstice-go/solstice/daemon/show"
	"github.com/solstice-ci/solstice-go/solstice/logtext"
)

// enqueueCmd asks for runs as a webhook would, by the queue.
type enqueueCmd struct {
	Dir            string `short:"C" default:"." type:"existingdir" placeholder:"DIR" help:"Directory in the work tree of the repository (${default})."`
	Forge          string `placeholder:"NAME" help:"Forge that has the repository. Default: the one whose URL the remote origin has, or the only one."`
	Repo           string `placeholder:"NAME" help:"Repository as the forge names it. Default: the remote origin's."`
	Ref            string `placeholder:"REF" help:"Branch, or full name of a ref, as the forge has it. Default: the one of --dir; of --repo, the default branch."`
	Commit         string `placeholder:"SHA" help:"Commit, which the forge has to have. Default: what --ref is; of --dir, HEAD."`
	Workflow       string `placeholder:"NAME" help:"Workflow to run, by path or name. Default: all that a manual start concerns."`
	IdempotencyKey string `placeholder:"KEY" help:"A repeat with the same key starts nothing more. Default: a new one."`
	RoutingKey     string `name:"routing-key" env:"AMQP_ROUTING_KEY" default:"runrequest" placeholder:"TOPIC" help:"Topic to publish to (${default})."`
	show.Output
}

// Help is kong's.
func (enqueueCmd) Help() string {
	return `Puts a run request on the queue, with the forges and the queue of the daemon, which need not run. Only what is at the forge is run. The exit status is 0 once the queue has the request for good.`
}

// Run is kong's.
func (c *enqueueCmd) Run(ctx context.Context, d *Daemon) (err error) {
	log := slog.New(slog.DiscardHandler)
	if err := queue.ValidateName("topic", c.RoutingKey); err != nil {
		return usage("there is no such topic", err, "")
	}
	all, closeAll, err := d.Open(ctx, d.Flags.StateDir, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAll()) }()
	r, err := c.request(ctx, all)
	if err != nil {
		return err
	}
	m, err := messages.Encode(r)
	if err != nil {
		return usage("this cannot be asked for", err, "")
	}
	m.ID = uuid.NewString()
	var db *bun.DB
	if !d.hasBroker() {
		if err := d.checkQueue(); err != nil {
			return err
		}
		if db, err = d.database(ctx); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, db.Close()) }()
	}
	q, err := d.queue(ctx, db, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	if err := q.Publish(ctx, c.RoutingKey, []queue.Message{m}, queue.PublishOptions{}); err != nil {
		return problem("the queue did not take the request", err, "repeat it with --idempotency-key "+r.IdempotencyKey+": it may have")
	}
	if c.JSON {
		return show.Document(r)
	}
	_, err = fmt.Fprintf(os.Stdout, "sent to %s: %s %s %s %s, key %s\n", c.RoutingKey, r.Forge, logtext.Plain(r.Repo.FullName()), cmp.Or(logtext.Plain(r.Ref), "-"), r.Commit, logtext.Plain(r.IdempotencyKey))
	return err
}

// request says what is to be run, as the forge has it.
func (c *enqueueCmd) request(ctx context.Context, all []forges.Forge) (r messages.RunRequest, err error) {
	r = messages.RunRequest{Commit: c.Commit, Ref: c.Ref, Workflow: c.Workflow, IdempotencyKey: cmp.Or(c.IdempotencyKey, "enqueue/"+uuid.NewString())}
	var one forges.Forge
	if c.Repo != "" {
		if one, err = named(all, c.Forge); err != nil {
			return r, err
		}
		r.Repo = repoNamed(c.Repo)
	} else {
		l, err := localgit.Locate(ctx, c.Dir)
		if err != nil {
			return r, usage("cannot read the repository", err, "run this in a git repository with a commit, or give --repo OWNER/NAME")
		}
		if one, r.Repo, err = match(all, c.Forge, l.Origin); err != nil {
			return r, err
		}
		if c.Ref == "" {
			r.Ref = l.Ref
			r.Commit = cmp.Or(r.Commit, l.Commit)
		}
	}
	if r.Ref != "" && !strings.HasPrefix(r.Ref, "refs/") {
		r.Ref = "refs/heads/" + r.Ref
	}
	r.Forge, r.Event = one.Name, forge.Event{Kind: forge.KindManual}
	what := cmp.Or(r.Commit, r.Ref, "HEAD")
	r.Commit, err = one.Forge.Resolve(ctx, r.Repo, what)
	switch {
	case errors.Is(err, forge.ErrNotFound), errors.Is(err, forge.ErrInvalid):
		return r, &daemon.ExitError{Code: daemon.ExitFailure, Err: problem(
			fmt.Sprintf("the forge %s has no %s of %s", one.Name, what, r.Repo.FullName()), err, "push it first, or check --repo, --ref and --commit, and what the forge's credentials may read")}
	case err != nil:
		return r, problem("the forge "+one.Name+" does not say what "+what+" is", err, "see check")
	}
	return r, nil
}

func repoNamed(name string) forge.Repo {
	name = strings.Trim(name, "/")
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		return forge.Repo{Owner: name[:i], Name: name[i+1:]}
	}
	return forge.Repo{Name: name}
}

func nameAll(all []forges.Forge) string {
	var names []string
	for _, f := range all {
		names = append(names, strings.TrimSpace(f.Name+" "+f.URL))
	}
	return strings.Join(names, ", ")
}

// named is the forge of that name, or the only one.
func named(all []forges.Forge, name string) (forges.Forge, error) {
	if name == "" && len(all) == 1 {
		return all[0], nil
	}
	for _, f := range all {
		if f.Name == name {
			return f, nil
		}
	}
	if name == "" {
		return forges.Forge{}, usage("there are several forges", nil, "give --forge: "+nameAll(all))
	}
	return forges.Forge{}, usage("there is no forge "+name, nil, "there are: "+nameAll(all))
}

// scp is a remote of git like git@host:owner/name.git.
var scp = regexp.MustCompile(`^(?:[^@/:]+@)?([^/:]+):([^/].*)$`)

// match finds the forge that a remote is at, and the repository's name there.
func match(all []forges.Forge, only, remote string) (forges.Forge, forge.Repo, error) {
	var host, path string
	var ssh bool
	if m := scp.FindStringSubmatch(remote); m != nil && !strings.Contains(remote, "://") {
		host, path, ssh = m[1], m[2], true
	} else if u, err := url.Parse(remote); err == nil && u.Host != "" {
		host, path, ssh = u.Host, u.Path, u.Scheme == "ssh"
		if ssh { // whose port is not the web's
			host = u.Hostname()
		}
	} else {
		return forges.Forge{}, forge.Repo{}, usage("the remote origin of this repository is at no forge", nil, "give --forge and --repo; there are: "+nameAll(all))
	}
	path = strings.TrimSuffix(strings.Trim(path, "/"), ".git")
	for _, f := range all {
		u, err := url.Parse(f.URL)
		if err != nil || u.Host == "" || only != "" && f.Name != only {
			continue
		}
		at, base := u.Host, strings.Trim(u.Path, "/")+"/"
		if ssh {
			at, base = u.Hostname(), "/" // a path of the web's is not in those
		}
		rest, ok := strings.CutPrefix(path, strings.TrimPrefix(base, "/"))
		if strings.EqualFold(at, host) && ok {
			return f, repoNamed(rest), nil
		}
	}
	return forges.Forge{}, forge.Repo{}, usage(fmt.Sprintf("the remote origin of this repository is at %s, which is no forge here", host), nil, "give --forge and --repo; there are: "+nameAll(all))
}
