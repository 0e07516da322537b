-- Where a pull request's statuses stand, what people should know about a run, and
-- the group of which one run is under way at a time.
ALTER TABLE runs ADD COLUMN head {{text}} NOT NULL DEFAULT '';
ALTER TABLE runs ADD COLUMN note {{text}} NOT NULL DEFAULT '';
ALTER TABLE runs ADD COLUMN concurrency {{text}} NOT NULL DEFAULT '';
CREATE INDEX runs_concurrency ON runs (repo_key, concurrency, id)
	WHERE concurrency <> '' AND state NOT IN ('succeeded', 'failed', 'cancelled', 'errored', 'skipped');
CREATE INDEX runs_head ON runs (head, id) WHERE head <> '';

-- A row that is locked while it is decided which run of a group goes on.
CREATE TABLE turns (name {{text}} PRIMARY KEY);
INSERT INTO turns (name) VALUES ('concurrency');
