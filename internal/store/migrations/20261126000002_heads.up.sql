-- The repositories whose heads are looked at, since a webhook may not come.
CREATE TABLE watched (
	forge      {{text}} NOT NULL,
	name       {{text}} NOT NULL,
	repo       {{text}},
	repo_id    {{text}} NOT NULL,
	wanted_at  BIGINT NOT NULL,
	heads_at   BIGINT NOT NULL,
	pulls_at   BIGINT NOT NULL,
	pulls_from BIGINT NOT NULL,
	next_at    BIGINT NOT NULL,
	PRIMARY KEY (forge, name)
);
CREATE INDEX watched_next ON watched (forge, next_at);
CREATE INDEX watched_wanted ON watched (wanted_at);

-- Where their branches, tags and pull requests are, by webhooks and by looking.
CREATE TABLE heads (
	forge      {{text}} NOT NULL,
	repo       {{text}} NOT NULL,
	ref        {{text}} NOT NULL,
	"commit"   {{text}} NOT NULL,
	told       {{text}},
	found      {{text}},
	other      {{text}} NOT NULL,
	other_at   BIGINT NOT NULL,
	changed_at BIGINT NOT NULL,
	version    BIGINT NOT NULL,
	PRIMARY KEY (forge, repo, ref),
	FOREIGN KEY (forge, repo) REFERENCES watched (forge, name) ON DELETE CASCADE
);
