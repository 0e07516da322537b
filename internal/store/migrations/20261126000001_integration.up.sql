-- What forges sent, with what became of it.
CREATE TABLE deliveries (
	id          {{text}} PRIMARY KEY,
	forge       {{text}} NOT NULL,
	delivery    {{text}} NOT NULL,
	kind        {{text}} NOT NULL,
	repo        {{text}} NOT NULL,
	state       {{text}} NOT NULL,
	reason      {{text}} NOT NULL,
	headers     {{text}},
	event       {{text}},
	body        {{bytes}},
	body_sum    {{text}} NOT NULL,
	replay_of   {{text}} NOT NULL,
	received_at BIGINT NOT NULL
);
CREATE UNIQUE INDEX deliveries_delivery ON deliveries (forge, delivery) WHERE delivery <> '' AND state = 'accepted';
CREATE INDEX deliveries_body ON deliveries (forge, body_sum, received_at);
CREATE INDEX deliveries_forge ON deliveries (forge, id);
CREATE INDEX deliveries_received ON deliveries (received_at);

-- The newest status for a commit and key, and which one the forge was told.
CREATE TABLE reports (
	forge         {{text}} NOT NULL,
	repo_name     {{text}} NOT NULL,
	"commit"      {{text}} NOT NULL,
	key           {{text}} NOT NULL,
	repo          {{text}},
	status        {{text}},
	version       BIGINT NOT NULL,
	reported      BIGINT NOT NULL,
	failures      BIGINT NOT NULL,
	reason        {{text}} NOT NULL,
	due_at        BIGINT NOT NULL,
	claimed_by    {{text}} NOT NULL,
	claimed_until BIGINT NOT NULL,
	changed_at    BIGINT NOT NULL,
	PRIMARY KEY (forge, repo_name, "commit", key)
);
CREATE INDEX reports_due ON reports (forge, due_at) WHERE due_at > 0;
CREATE INDEX reports_changed ON reports (changed_at);
