-- One word for one thing: a discarded body has a discard reason, an erasure has a reason.
ALTER TABLE quarantine RENAME COLUMN resolution TO discard_reason;
ALTER TABLE erasures RENAME COLUMN why TO reason;
ALTER TABLE erasures RENAME CONSTRAINT erasures_why_check TO erasures_reason_check;

DROP PROCEDURE erase_order(text, text);
CREATE PROCEDURE erase_order(erased_order_no text, erasure_reason text) LANGUAGE plpgsql
    SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    events bigint;
    entries bigint;
BEGIN
    ALTER TABLE order_events DISABLE TRIGGER order_events_immutable;
    UPDATE order_events
    SET state = convert_to(
        (convert_from(state, 'UTF8')::jsonb || '{"body": "", "remote": null}')::text, 'UTF8')
    WHERE originator_id = erased_order_no;
    GET DIAGNOSTICS events = ROW_COUNT;
    IF events = 0 THEN
        RAISE EXCEPTION 'nothing was recorded of the order %', erased_order_no USING ERRCODE = 'no_data_found';
    END IF;
    ALTER TABLE order_events ENABLE ALWAYS TRIGGER order_events_immutable;
    UPDATE quarantine SET body = NULL, remote = NULL WHERE order_no = erased_order_no;
    GET DIAGNOSTICS entries = ROW_COUNT;
    -- The hash of a body could still confirm a guess at it.
    UPDATE idempotency_keys SET body_sha256 = '' WHERE order_no = erased_order_no;
    INSERT INTO erasures (order_no, reason, events, entries)
    VALUES (erased_order_no, erasure_reason, events, entries);
END $$;
REVOKE EXECUTE ON PROCEDURE erase_order(text, text) FROM PUBLIC;
