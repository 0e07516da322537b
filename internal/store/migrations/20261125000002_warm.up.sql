-- What a machine was made from, as its pool says it: one that waits for a job
-- and is of another recipe than its pool's is no use.
ALTER TABLE machines ADD COLUMN recipe {{text}} NOT NULL DEFAULT '';

-- Pools at a host whose machines without a job did not come to be ready, or
-- died while they waited: how often since one last did, and when to try again.
CREATE TABLE warm_failures (
	host      {{text}} NOT NULL,
	pool      {{text}} NOT NULL,
	failures  BIGINT NOT NULL,
	failed_at BIGINT NOT NULL,
	retry_at  BIGINT NOT NULL,
	reason    {{text}} NOT NULL,
	PRIMARY KEY (host, pool)
);
