-- The index of bloblog: streams, and the objects that hold their bytes.
CREATE TABLE log_streams (
	stream {{text}} PRIMARY KEY,
	epoch  BIGINT NOT NULL,
	size   BIGINT NOT NULL,
	sealed BOOLEAN NOT NULL,
	sha256 {{text}} NOT NULL
);

CREATE TABLE log_entries (
	stream    {{text}} NOT NULL REFERENCES log_streams (stream) ON DELETE CASCADE,
	starts_at BIGINT NOT NULL,
	epoch     BIGINT NOT NULL,
	length    BIGINT NOT NULL,
	key       {{text}} NOT NULL,
	sha256    {{text}} NOT NULL,
	compacted BOOLEAN NOT NULL,
	PRIMARY KEY (stream, starts_at)
);
