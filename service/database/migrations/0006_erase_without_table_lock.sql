-- The trigger lets an erasure pass, so that erase_order need not disable it: that waited for a VACUUM or for CREATE INDEX
-- CONCURRENTLY, and every webhook waited behind it.
CREATE FUNCTION erased(state bytea) RETURNS bytea IMMUTABLE LANGUAGE sql
    SET search_path = pg_catalog, pg_temp
    RETURN convert_to((convert_from(state, 'UTF8')::jsonb || '{"body": "", "remote": null}')::text, 'UTF8');

CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND (NEW.originator_id, NEW.originator_version, NEW.topic, NEW.notification_id, NEW.recorded_at)
        = (OLD.originator_id, OLD.originator_version, OLD.topic, OLD.notification_id, OLD.recorded_at) THEN
        -- Only an erasure of exactly these bytes, by a member of the owner, passes.
        IF NEW.state = erased(OLD.state)
            AND pg_has_role((SELECT relowner FROM pg_class WHERE oid = TG_RELID), 'USAGE') THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION '% of % is refused: events are immutable', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'integrity_constraint_violation';
END $$;

CREATE OR REPLACE PROCEDURE erase_order(erased_order_no text, erasure_reason text) LANGUAGE plpgsql
    SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    events bigint;
    entries bigint;
BEGIN
    UPDATE order_events SET state = erased(state) WHERE originator_id = erased_order_no;
    GET DIAGNOSTICS events = ROW_COUNT;
    IF events = 0 THEN
        RAISE EXCEPTION 'no event was recorded for the order %', erased_order_no USING ERRCODE = 'no_data_found';
    END IF;
    UPDATE quarantine SET body = NULL, remote = NULL WHERE order_no = erased_order_no;
    GET DIAGNOSTICS entries = ROW_COUNT;
    -- The hash of a body could still confirm a guess at it. That of the reported status recognises a late retry too.
    UPDATE idempotency_keys AS keys
    SET body_sha256 = sha256(convert_to(convert_from(event.state, 'UTF8')::jsonb ->> 'reported_status', 'UTF8'))
    FROM order_events AS event
    WHERE keys.order_no = erased_order_no
      AND event.originator_id = keys.order_no AND event.originator_version = keys.version;
    INSERT INTO erasures (order_no, reason, events, entries)
    VALUES (erased_order_no, erasure_reason, events, entries);
END $$;
