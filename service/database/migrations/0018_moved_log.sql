-- Where the log goes on, after a move to another database. No service starts on a log that was moved.
ALTER TABLE log_identity ADD COLUMN moved_to text;
