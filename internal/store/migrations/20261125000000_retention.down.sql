DROP INDEX machines_gone;
DROP INDEX jobs_copied;
DROP INDEX runs_leaving;
DROP INDEX runs_repo_logs;
DROP INDEX runs_repo_ended;
DROP INDEX runs_ended;
ALTER TABLE runs DROP COLUMN retention;
