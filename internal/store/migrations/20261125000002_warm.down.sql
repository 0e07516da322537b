DROP TABLE warm_failures;
ALTER TABLE machines DROP COLUMN recipe;
