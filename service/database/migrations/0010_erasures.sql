-- An erasure also empties words outside the vocabulary, which may be any text; it can stop at a version; and followers
-- can read the erasures in their order.
CREATE OR REPLACE FUNCTION erased(state bytea) RETURNS bytea IMMUTABLE LANGUAGE sql
    SET search_path = pg_catalog, pg_temp
    RETURN convert_to((
        convert_from(state, 'UTF8')::jsonb || '{"body": "", "remote": null}'
        || CASE WHEN convert_from(state, 'UTF8')::jsonb ->> 'verdict' = 'unrecognised'
            THEN '{"reported_status": ""}' ELSE '{}' END::jsonb
    )::text, 'UTF8');

ALTER TABLE erasures ADD COLUMN version bigint;
UPDATE erasures SET version = (
    SELECT max(originator_version) FROM order_events
    WHERE originator_id = order_no AND recorded_at <= erased_at
);
CREATE INDEX erasures_order_no_idx ON erasures (order_no, erased_at);

-- The order that an unparseable body names.
ALTER TABLE quarantine ADD COLUMN named_order_no text COLLATE "C";
CREATE INDEX quarantine_named_idx ON quarantine (named_order_no);
DO $$
BEGIN
    IF current_user = 'order_tracking_owner' THEN
        GRANT INSERT (named_order_no) ON quarantine TO order_tracking_service;
    END IF;
END $$;

DROP PROCEDURE erase_order(text, text);
CREATE PROCEDURE erase_order(erased_order_no text, erasure_reason text, last_version bigint DEFAULT NULL)
    LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    events bigint;
    entries bigint;
BEGIN
    -- Erasures take turns, so that their ids rise in the order of their commits.
    PERFORM pg_advisory_xact_lock(hashtextextended('order_tracking erasure', 0));
    last_version := coalesce(last_version, (
        SELECT max(originator_version) FROM order_events WHERE originator_id = erased_order_no));
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
REVOKE EXECUTE ON PROCEDURE erase_order(text, text, bigint) FROM PUBLIC;
