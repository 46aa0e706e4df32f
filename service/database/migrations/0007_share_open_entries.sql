-- Equal bodies share an open entry only: a body that came again after its entry was discarded or retried was acknowledged
-- and could not be retried any more.
ALTER TABLE quarantine DROP CONSTRAINT quarantine_body_sha256_key;
CREATE UNIQUE INDEX quarantine_shared_idx ON quarantine (body_sha256) WHERE state = 'open' AND times_seen < 1000;
