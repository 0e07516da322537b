ALTER TABLE orchestrators DROP COLUMN contacts;
