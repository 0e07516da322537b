DROP TABLE turns;
DROP INDEX runs_head;
DROP INDEX runs_concurrency;
ALTER TABLE runs DROP COLUMN concurrency;
ALTER TABLE runs DROP COLUMN note;
ALTER TABLE runs DROP COLUMN head;
