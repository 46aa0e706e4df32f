-- An erasure also empties what endpoints said of the order, rewrites each tile of salts once, and parses an event once.

CREATE OR REPLACE FUNCTION erased(state bytea) RETURNS bytea IMMUTABLE LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    event jsonb := convert_from(state, 'UTF8');
BEGIN
    event := event || '{"body": "", "remote": null}';
    IF event ->> 'verdict' = 'unrecognised' THEN
        event := event || '{"reported_status": ""}';
    END IF;
    RETURN convert_to(event::text, 'UTF8');
END $$;

-- Empties what endpoints said of an order: they may have repeated its events.
CREATE FUNCTION erase_echoes(erased_order_no text) RETURNS void LANGUAGE sql
    SET search_path = pg_catalog, public, pg_temp AS $$
    UPDATE held_orders SET last_error = NULL WHERE order_no = erased_order_no AND last_error IS NOT NULL;
    UPDATE subscriptions SET responses = (
        SELECT json_agg(
            CASE WHEN response ->> 'order_no' = erased_order_no
                 THEN (response::jsonb || '{"error": null}')::json ELSE response END ORDER BY number)
        FROM json_array_elements(responses) WITH ORDINALITY AS saved (response, number))
    WHERE EXISTS (
        SELECT FROM json_array_elements(responses) AS response
        WHERE response ->> 'order_no' = erased_order_no AND response ->> 'error' IS NOT NULL);
$$;
REVOKE EXECUTE ON FUNCTION erase_echoes(text) FROM PUBLIC;

-- Runs with the rights of its caller, who must be a member of the log's owner. It locks one order's events and no table.
CREATE OR REPLACE PROCEDURE erase_order(erased_order_no text, erasure_reason text, last_version bigint DEFAULT NULL)
    LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    events bigint;
    entries bigint;
    touched record;
    place integer;
    no_salt CONSTANT bytea := decode(repeat('00', 16), 'hex');
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
    -- A tile of salts is rewritten once.
    FOR touched IN
        SELECT tile, salts, array_agg((notification_id % 256)::integer) AS places
        FROM order_events JOIN history_salts ON tile = notification_id / 256
        WHERE originator_id = erased_order_no AND originator_version <= last_version
        GROUP BY tile
    LOOP
        FOREACH place IN ARRAY touched.places LOOP
            IF length(touched.salts) > place * 16 THEN
                touched.salts := overlay(touched.salts PLACING no_salt FROM place * 16 + 1);
            END IF;
        END LOOP;
        UPDATE history_salts SET salts = touched.salts WHERE tile = touched.tile;
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
    PERFORM erase_echoes(erased_order_no);
    INSERT INTO erasures (order_no, reason, events, entries, version)
    VALUES (erased_order_no, erasure_reason, events, entries, last_version);
END $$;
