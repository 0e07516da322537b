-- How much of a run that has ended is kept: '' all; 'logs_going' and then
-- 'logs_gone'; 'going'. What is going is marked before anything of it is
-- deleted, so that a crash in between is seen.
ALTER TABLE runs ADD COLUMN retention {{text}} NOT NULL DEFAULT '';

-- Runs that have ended, by when, of all repositories and of each; those that
-- still have their logs; and the few that are being removed.
CREATE INDEX runs_ended ON runs (finished_at, repo_key) WHERE finished_at > 0;
CREATE INDEX runs_repo_ended ON runs (repo_key, finished_at, id) WHERE finished_at > 0;
CREATE INDEX runs_repo_logs ON runs (repo_key, finished_at, id) WHERE finished_at > 0 AND retention = '';
CREATE INDEX runs_leaving ON runs (id) WHERE retention IN ('logs_going', 'going');
CREATE INDEX jobs_copied ON jobs (copied_from) WHERE copied_from <> '';
CREATE INDEX machines_gone ON machines (gone_at) WHERE state = 'gone';
