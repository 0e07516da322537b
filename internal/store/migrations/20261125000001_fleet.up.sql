-- Where agents reach an orchestrator, as a JSON list: told to the agents of all.
-- Those of before come again within seconds.
DELETE FROM orchestrators;
ALTER TABLE orchestrators ADD COLUMN contacts {{text}} NOT NULL DEFAULT '[]';
