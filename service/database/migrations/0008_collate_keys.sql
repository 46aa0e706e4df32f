-- The order of these keys must not depend on the operating system's locales: an upgrade of its C library can change them,
-- and indexes then miss rows.
ALTER TABLE view_names ALTER COLUMN view_name TYPE text COLLATE "C";
ALTER TABLE api_keys ALTER COLUMN name TYPE text COLLATE "C";
ALTER TABLE quarantine ALTER COLUMN state TYPE text COLLATE "C";
