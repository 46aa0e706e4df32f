-- Browsers get sessions of their own instead of the API key, and operators' actions are recorded.
CREATE TABLE sessions (
    session_sha256  bytea       NOT NULL PRIMARY KEY CHECK (length(session_sha256) = 32),
    key_name        text        NOT NULL COLLATE "C" REFERENCES api_keys (name),
    opened_at       timestamptz NOT NULL DEFAULT now(),
    used_at         timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE operations (
    operation_id  bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    performed_at  timestamptz NOT NULL DEFAULT now(),
    via           text        NOT NULL,
    actor         text,
    action        text        NOT NULL,
    subject       text        NOT NULL,
    reason        text
);

CREATE FUNCTION refuse_unrevoking() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NEW.revoked_at IS DISTINCT FROM OLD.revoked_at AND OLD.revoked_at IS NOT NULL THEN
        RAISE EXCEPTION 'the key % is revoked, which is permanent', OLD.name
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER api_keys_stay_revoked BEFORE UPDATE ON api_keys
    FOR EACH ROW EXECUTE FUNCTION refuse_unrevoking();
ALTER TABLE api_keys ENABLE ALWAYS TRIGGER api_keys_stay_revoked;

DO $$
BEGIN
    IF current_user <> 'order_tracking_owner' THEN
        RETURN;
    END IF;
    GRANT SELECT, INSERT, DELETE, UPDATE (used_at) ON sessions TO order_tracking_service;
    GRANT SELECT, INSERT (via, actor, action, subject, reason) ON operations TO order_tracking_service;
    GRANT SELECT ON SEQUENCE operations_operation_id_seq TO order_tracking_service;
END $$;
