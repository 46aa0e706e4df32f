-- The hash of the file that brought each version: it tells an unreleased schema from a released one.
ALTER TABLE schema_version ADD COLUMN sha256 text;
