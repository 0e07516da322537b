CREATE TABLE meta (
	key   {{text}} PRIMARY KEY,
	value {{text}} NOT NULL
);

-- The clock's high-water mark, SQLite only (see clock.go), and a row that is
-- locked while messages of the outbox are claimed.
INSERT INTO meta (key, value) VALUES ('clock', '0'), ('outbox', '');

CREATE TABLE leases (
	name  {{text}} PRIMARY KEY,
	owner {{text}} NOT NULL,
	until BIGINT NOT NULL
);

-- Who serves this database, with the pools that it offers as JSON.
CREATE TABLE orchestrators (
	id          {{text}} PRIMARY KEY,
	addr        {{text}} NOT NULL,
	pools       {{text}},
	slots       BIGINT NOT NULL,
	seen_at     BIGINT NOT NULL,
	lease_until BIGINT NOT NULL
);

-- One row per provider host, locked while its machines are counted and made.
CREATE TABLE capacity (
	host {{text}} PRIMARY KEY
);

CREATE TABLE runs (
	id              {{text}} PRIMARY KEY,
	state           {{text}} NOT NULL,
	forge           {{text}} NOT NULL,
	repo            {{text}},
	repo_key        {{text}} NOT NULL,
	"commit"        {{text}} NOT NULL,
	ref             {{text}} NOT NULL,
	event           {{text}},
	inputs          {{text}},
	delivery        {{text}} NOT NULL,
	idempotency_key {{text}} NOT NULL,
	workflow_path   {{text}} NOT NULL,
	workflow_name   {{text}} NOT NULL,
	priority        BIGINT NOT NULL,
	rerun_of        {{text}} NOT NULL,
	trace           {{text}} NOT NULL,
	awaits          {{text}} NOT NULL,
	reason          {{text}} NOT NULL,
	diagnostics     {{text}},
	cancel_reason   {{text}} NOT NULL,
	version         BIGINT NOT NULL,
	created_at      BIGINT NOT NULL,
	started_at      BIGINT NOT NULL,
	finished_at     BIGINT NOT NULL
);
CREATE UNIQUE INDEX runs_delivery ON runs (forge, delivery, workflow_path) WHERE delivery <> '';
CREATE UNIQUE INDEX runs_idempotency ON runs (idempotency_key, workflow_path) WHERE idempotency_key <> '';
CREATE INDEX runs_repo ON runs (repo_key, id);
CREATE INDEX runs_state ON runs (state, id);
CREATE INDEX runs_repo_state ON runs (repo_key, state, id);
CREATE INDEX runs_repo_ref ON runs (repo_key, ref, id);
CREATE INDEX runs_forge ON runs (forge, id);
CREATE INDEX runs_commit ON runs ("commit", id);

CREATE TABLE jobs (
	id          {{text}} PRIMARY KEY,
	run_id      {{text}} NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
	idx         BIGINT NOT NULL,
	key         {{text}} NOT NULL,
	name        {{text}} NOT NULL,
	label       {{text}} NOT NULL,
	state       {{text}} NOT NULL,
	needs       {{text}},
	spec        {{text}},
	outputs     {{text}},
	class       {{text}} NOT NULL,
	reason      {{text}} NOT NULL,
	priority    BIGINT NOT NULL,
	repo_key    {{text}} NOT NULL,
	retries     {{text}},
	attempts    BIGINT NOT NULL,
	attempt_id  {{text}} NOT NULL,
	hold_id     {{text}} NOT NULL,
	copied_from {{text}} NOT NULL,
	version     BIGINT NOT NULL,
	queued_at   BIGINT NOT NULL,
	started_at  BIGINT NOT NULL,
	finished_at BIGINT NOT NULL
);
CREATE UNIQUE INDEX jobs_run ON jobs (run_id, idx);
-- Only what can be claimed is in here, so claiming costs the same however many
-- jobs are finished; repositories are skipped through by their first entries.
CREATE INDEX jobs_queue ON jobs (label, repo_key, priority DESC, queued_at, id) WHERE state = 'queued' AND hold_id = '';
CREATE INDEX jobs_active ON jobs (repo_key) WHERE state IN ('assigned', 'running');
CREATE INDEX jobs_waiting ON jobs (run_id) WHERE state = 'waiting';
CREATE INDEX jobs_hold ON jobs (hold_id) WHERE hold_id <> '';

CREATE TABLE attempts (
	id            {{text}} PRIMARY KEY,
	job_id        {{text}} NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
	run_id        {{text}} NOT NULL,
	number        BIGINT NOT NULL,
	state         {{text}} NOT NULL,
	epoch         BIGINT NOT NULL,
	owner         {{text}} NOT NULL,
	lease_until   BIGINT NOT NULL,
	contact_at    BIGINT NOT NULL,
	machine_id    {{text}} NOT NULL,
	acked_seq     BIGINT NOT NULL,
	log_stream    {{text}} NOT NULL,
	log_size      BIGINT NOT NULL,
	log_lost      BOOLEAN NOT NULL,
	cancel_reason {{text}} NOT NULL,
	cancel_at     BIGINT NOT NULL,
	deadline_at   BIGINT NOT NULL,
	class         {{text}} NOT NULL,
	reason        {{text}} NOT NULL,
	console       {{text}} NOT NULL,
	result        {{text}} NOT NULL,
	created_at    BIGINT NOT NULL,
	started_at    BIGINT NOT NULL,
	finished_at   BIGINT NOT NULL
);
CREATE UNIQUE INDEX attempts_job ON attempts (job_id, number);
-- As many entries as the fleet has machines.
CREATE INDEX attempts_live ON attempts (owner, id) WHERE state IN ('assigned', 'running');

CREATE TABLE steps (
	attempt_id  {{text}} NOT NULL REFERENCES attempts (id) ON DELETE CASCADE,
	idx         BIGINT NOT NULL,
	name        {{text}} NOT NULL,
	result      {{text}} NOT NULL,
	exit_code   BIGINT NOT NULL,
	signal      {{text}} NOT NULL,
	reason      {{text}} NOT NULL,
	outputs     {{text}},
	continued   BOOLEAN NOT NULL,
	started_at  BIGINT NOT NULL,
	finished_at BIGINT NOT NULL,
	PRIMARY KEY (attempt_id, idx)
);

CREATE TABLE machines (
	id            {{text}} PRIMARY KEY,
	pool          {{text}} NOT NULL,
	host          {{text}} NOT NULL,
	state         {{text}} NOT NULL,
	owner         {{text}} NOT NULL,
	lease_until   BIGINT NOT NULL,
	attempt_id    {{text}} NOT NULL,
	token_hash    {{text}} NOT NULL,
	token_expires BIGINT NOT NULL,
	nonce_hash    {{text}} NOT NULL,
	cred_hash     {{text}} NOT NULL,
	os            {{text}} NOT NULL,
	arch          {{text}} NOT NULL,
	agent_version {{text}} NOT NULL,
	protocol      BIGINT NOT NULL,
	has_git       BOOLEAN NOT NULL,
	contact_at    BIGINT NOT NULL,
	boot_by       BIGINT NOT NULL,
	expires_at    BIGINT NOT NULL,
	reason        {{text}} NOT NULL,
	created_at    BIGINT NOT NULL,
	ready_at      BIGINT NOT NULL,
	destroying_at BIGINT NOT NULL,
	gone_at       BIGINT NOT NULL
);
CREATE UNIQUE INDEX machines_token ON machines (token_hash) WHERE token_hash <> '';
CREATE UNIQUE INDEX machines_cred ON machines (cred_hash) WHERE cred_hash <> '';
CREATE INDEX machines_host ON machines (host, pool) WHERE state <> 'gone';
CREATE INDEX machines_owner ON machines (owner) WHERE state <> 'gone';
CREATE INDEX machines_live ON machines (id) WHERE state <> 'gone';

CREATE TABLE outbox (
	id            {{serial}},
	key           {{text}} NOT NULL,
	topic         {{text}} NOT NULL,
	content_type  {{text}} NOT NULL,
	body          {{bytes}},
	attributes    {{text}},
	"coalesce"    BOOLEAN NOT NULL,
	created_at    BIGINT NOT NULL,
	claimed_by    {{text}} NOT NULL,
	claimed_until BIGINT NOT NULL
);
CREATE INDEX outbox_key ON outbox (key, id);
CREATE INDEX outbox_claimed ON outbox (key) WHERE claimed_until > 0;
