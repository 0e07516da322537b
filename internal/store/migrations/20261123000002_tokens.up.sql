-- Bearer tokens of people and programs; a revoked one has no row.
CREATE TABLE tokens (
	id         {{text}} PRIMARY KEY,
	name       {{text}} NOT NULL,
	hash       {{text}} NOT NULL,
	role       {{text}} NOT NULL,
	created_at BIGINT NOT NULL,
	expires_at BIGINT NOT NULL,
	used_at    BIGINT NOT NULL
);
CREATE UNIQUE INDEX tokens_name ON tokens (name);
CREATE UNIQUE INDEX tokens_hash ON tokens (hash);
