-- The provable history: a Merkle tree over the log (docs/proof.md). A restart begins another tree; the last one is in
-- use. These tables only grow, except that an erasure zeroes salts.

CREATE TABLE history_trees (
    tree        integer     NOT NULL PRIMARY KEY,       -- 1, 2, 3, ...
    header      text        NOT NULL,                   -- the entry at index 0
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE history_tiles (
    tree    integer  NOT NULL REFERENCES history_trees (tree),
    level   smallint NOT NULL,
    tile    bigint   NOT NULL,
    hashes  bytea    NOT NULL CHECK (length(hashes) % 32 = 0 AND length(hashes) BETWEEN 32 AND 8192),
    PRIMARY KEY (tree, level, tile)
) WITH (autovacuum_vacuum_scale_factor = 0.02, toast.autovacuum_vacuum_scale_factor = 0.02);
-- Hashes cannot be compressed, so PostgreSQL shall not try.
ALTER TABLE history_tiles ALTER COLUMN hashes SET STORAGE EXTERNAL;

-- The salts of 256 positions. Zeros after an erasure.
CREATE TABLE history_salts (
    tile   bigint NOT NULL PRIMARY KEY,
    salts  bytea  NOT NULL CHECK (length(salts) % 16 = 0 AND length(salts) BETWEEN 16 AND 4096)
) WITH (autovacuum_vacuum_scale_factor = 0.02, toast.autovacuum_vacuum_scale_factor = 0.02);
ALTER TABLE history_salts ALTER COLUMN salts SET STORAGE EXTERNAL;

-- The commitments to erased bodies, and to the whole states, which an entry may have instead. Null marks an event that no
-- tree had at its erasure.
CREATE TABLE history_commitments (
    position    bigint NOT NULL PRIMARY KEY,
    commitment  bytea  CHECK (length(commitment) = 32),
    raw         bytea  CHECK (length(raw) = 32)
);

-- The last signed checkpoint of each tree.
CREATE TABLE history_checkpoints (
    tree  integer NOT NULL PRIMARY KEY REFERENCES history_trees (tree),
    size  bigint  NOT NULL,
    note  text    NOT NULL
);

CREATE FUNCTION refuse_history_change() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND TG_TABLE_NAME = 'history_salts' THEN
        -- Only an erasure, by a member of the owner, passes: each salt stays or becomes zeros.
        IF NEW.tile = OLD.tile AND length(NEW.salts) = length(OLD.salts)
            AND pg_has_role((SELECT relowner FROM pg_class WHERE oid = TG_RELID), 'USAGE')
            AND (SELECT bool_and(substr(NEW.salts, at, 16) IN (substr(OLD.salts, at, 16), decode(repeat('00', 16), 'hex')))
                 FROM generate_series(1, length(OLD.salts), 16) AS at) THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION '% of % is refused: the history only grows', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'integrity_constraint_violation';
END $$;

CREATE TRIGGER history_trees_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON history_trees
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_history_change();
CREATE TRIGGER history_tiles_kept BEFORE DELETE OR TRUNCATE ON history_tiles
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_history_change();
CREATE TRIGGER history_tiles_grow BEFORE UPDATE ON history_tiles FOR EACH ROW
    WHEN ((NEW.tree, NEW.level, NEW.tile) <> (OLD.tree, OLD.level, OLD.tile)
        OR substr(NEW.hashes, 1, length(OLD.hashes)) <> OLD.hashes)
    EXECUTE FUNCTION refuse_history_change();
CREATE TRIGGER history_salts_kept BEFORE DELETE OR TRUNCATE ON history_salts
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_history_change();
CREATE TRIGGER history_salts_grow BEFORE UPDATE ON history_salts FOR EACH ROW
    WHEN (NEW.tile <> OLD.tile OR substr(NEW.salts, 1, length(OLD.salts)) <> OLD.salts)
    EXECUTE FUNCTION refuse_history_change();
CREATE TRIGGER history_commitments_kept BEFORE DELETE OR TRUNCATE ON history_commitments
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_history_change();
CREATE TRIGGER history_commitments_grow BEFORE UPDATE ON history_commitments FOR EACH ROW
    WHEN (NEW.position <> OLD.position OR OLD.commitment IS NOT NULL)
    EXECUTE FUNCTION refuse_history_change();
CREATE TRIGGER history_checkpoints_kept BEFORE DELETE OR TRUNCATE ON history_checkpoints
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_history_change();
CREATE TRIGGER history_checkpoints_grow BEFORE UPDATE ON history_checkpoints FOR EACH ROW
    WHEN (NEW.tree <> OLD.tree OR NEW.size < OLD.size)
    EXECUTE FUNCTION refuse_history_change();
ALTER TABLE history_trees ENABLE ALWAYS TRIGGER history_trees_kept;
ALTER TABLE history_tiles ENABLE ALWAYS TRIGGER history_tiles_kept;
ALTER TABLE history_tiles ENABLE ALWAYS TRIGGER history_tiles_grow;
ALTER TABLE history_salts ENABLE ALWAYS TRIGGER history_salts_kept;
ALTER TABLE history_salts ENABLE ALWAYS TRIGGER history_salts_grow;
ALTER TABLE history_commitments ENABLE ALWAYS TRIGGER history_commitments_kept;
ALTER TABLE history_commitments ENABLE ALWAYS TRIGGER history_commitments_grow;
ALTER TABLE history_checkpoints ENABLE ALWAYS TRIGGER history_checkpoints_kept;
ALTER TABLE history_checkpoints ENABLE ALWAYS TRIGGER history_checkpoints_grow;

-- Waits for the transaction that adds to the history, and keeps others from it until the end of this one.
CREATE FUNCTION lock_history() RETURNS void LANGUAGE sql SET search_path = pg_catalog, pg_temp
    AS $$ SELECT pg_advisory_xact_lock(hashtextextended('order_tracking history', 0)) $$;

CREATE OR REPLACE PROCEDURE erase_order(erased_order_no text, erasure_reason text, last_version bigint DEFAULT NULL)
    LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    events bigint;
    entries bigint;
    event_position bigint;
BEGIN
    -- Erasures take turns, so that their ids rise in the order of their commits.
    PERFORM pg_advisory_xact_lock(hashtextextended('order_tracking erasure', 0));
    last_version := coalesce(last_version, (
        SELECT max(originator_version) FROM order_events WHERE originator_id = erased_order_no));
    -- In the history, a commitment takes the place of each salt, with which a guess at the body could be confirmed.
    PERFORM lock_history();
    INSERT INTO history_commitments (position, commitment, raw)
    SELECT event.notification_id,
        sha256(salt || convert_to(coalesce(convert_from(event.state, 'UTF8')::jsonb ->> 'body', ''), 'UTF8')),
        sha256(salt || event.state)
    FROM order_events AS event
    LEFT JOIN LATERAL (
        SELECT substr(salts, (event.notification_id % 256)::integer * 16 + 1, 16) AS salt FROM history_salts
        WHERE tile = event.notification_id / 256 AND length(salts) > event.notification_id % 256 * 16
    ) AS salted ON true
    WHERE event.originator_id = erased_order_no AND event.originator_version <= last_version
    ON CONFLICT DO NOTHING;
    FOR event_position IN
        SELECT notification_id FROM order_events
        WHERE originator_id = erased_order_no AND originator_version <= last_version
    LOOP
        UPDATE history_salts
        SET salts = overlay(salts PLACING decode(repeat('00', 16), 'hex')
            FROM (event_position % 256)::integer * 16 + 1 FOR 16)
        WHERE tile = event_position / 256 AND length(salts) > event_position % 256 * 16;
    END LOOP;
    UPDATE order_events SET state = erased(state)
    WHERE originator_id = erased_order_no AND originator_version <= last_version;
    GET DIAGNOSTICS events = ROW_COUNT;
    IF events = 0 THEN
        RAISE EXCEPTION 'no event was recorded for the order %', erased_order_no USING ERRCODE = 'no_data_found';
    END IF;
    UPDATE quarantine SET body = NULL, remote = NULL
    WHERE order_no = erased_order_no AND version <= last_version AND body IS NOT NULL;
    GET DIAGNOSTICS entries = ROW_COUNT;
    -- The hash of a body could still confirm a guess at it. That of the reported status recognises a late retry too.
    UPDATE idempotency_keys AS keys
    SET body_sha256 = sha256(convert_to(convert_from(event.state, 'UTF8')::jsonb ->> 'reported_status', 'UTF8'))
    FROM order_events AS event
    WHERE keys.order_no = erased_order_no AND keys.version <= last_version
      AND event.originator_id = keys.order_no AND event.originator_version = keys.version;
    INSERT INTO erasures (order_no, reason, events, entries, version)
    VALUES (erased_order_no, erasure_reason, events, entries, last_version);
END $$;

DO $$
BEGIN
    IF current_user = 'order_tracking_owner' THEN
        GRANT SELECT ON history_trees, history_tiles, history_salts, history_commitments, history_checkpoints
            TO order_tracking_service;
        GRANT INSERT (tree, header) ON history_trees TO order_tracking_service;
        GRANT INSERT, UPDATE (hashes) ON history_tiles TO order_tracking_service;
        GRANT INSERT, UPDATE (salts) ON history_salts TO order_tracking_service;
        GRANT UPDATE (commitment, raw) ON history_commitments TO order_tracking_service;
        GRANT INSERT, UPDATE (size, note) ON history_checkpoints TO order_tracking_service;
    END IF;
END $$;
