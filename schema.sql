-- The current schema, applied once, in one transaction, to a database that has no table schema_version. CREATE
-- without IF NOT EXISTS, which would hide a wrong table. Every change of the log's part needs a migration in
-- service/database/migrations/; a test checks that schema.sql and the migrations give the same schema. Then
-- "python -m tests.support.catalog" writes what 'check' compares databases with.

------------------------------------------------------------------------------------------------------------
-- Two roles. The owner owns the log, migrates it and erases from it. The service owns the views and can only
-- add to the log. If the role that applies this file may not create roles, it owns everything, and 'check' reports
-- what that leaves unprotected. Roles belong to the whole server: all of its databases share them.

DO $$
DECLARE
    role_name text;
BEGIN
    IF NOT (SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user) THEN
        RETURN;
    END IF;
    FOREACH role_name IN ARRAY ARRAY['order_tracking_owner', 'order_tracking_service'] LOOP
        BEGIN
            -- Without a password: the service logs in over a trusted socket, or with a password set later.
            EXECUTE format('CREATE ROLE %I %s', role_name,
                CASE role_name WHEN 'order_tracking_service' THEN 'LOGIN' ELSE 'NOLOGIN' END);
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL;  -- created for another database of this server
        END;
        -- A superuser may act as any role. Others must be members, which may be refused for an existing role.
        BEGIN
            IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
                EXECUTE format('GRANT %I TO CURRENT_USER', role_name);
            END IF;
        EXCEPTION WHEN insufficient_privilege THEN
            RETURN;
        END;
    END LOOP;
    GRANT USAGE, CREATE ON SCHEMA public TO order_tracking_owner;
    GRANT USAGE ON SCHEMA public TO order_tracking_service;
    REVOKE CREATE ON SCHEMA public FROM PUBLIC;
    -- The owner creates the views' schemas for the service. The service itself may create none: a schema with the
    -- name of a role comes first on that role's search path, and its functions would run with that role's rights.
    EXECUTE format('GRANT CREATE ON DATABASE %I TO order_tracking_owner', current_database());
    GRANT order_tracking_service TO order_tracking_owner;
    PERFORM set_config('role', 'order_tracking_owner', true);
END $$;

CREATE TABLE schema_version (
    version     integer     NOT NULL PRIMARY KEY,
    applied_at  timestamptz NOT NULL DEFAULT now(),
    sha256      text                                    -- of the migration's file
);

------------------------------------------------------------------------------------------------------------
-- The log: one row for each event, one event for each report. The layout is that of eventsourcing's own PostgreSQL
-- recorder for an application named "order" with text ids; recorded_at is an addition.
-- No CHECK on version, topic or state, since the library may write them too.

CREATE TABLE order_events (
    originator_id       text        NOT NULL COLLATE "C",       -- the order number, as the sender wrote it
    originator_version  bigint      NOT NULL,                   -- 1, 2, 3, ... for each order
    topic               text        NOT NULL,
    state               bytea       NOT NULL,
    notification_id     bigint      GENERATED ALWAYS AS IDENTITY,  -- the position; gaps have no meaning
    recorded_at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Two writers cannot both record an order's next version: the one with a stale state is refused.
    CONSTRAINT order_events_pkey PRIMARY KEY (originator_id, originator_version),
    CONSTRAINT order_events_notification_id_idx UNIQUE (notification_id)
) WITH (
    -- Append-only: only refused batches leave rows to vacuum, but the planner's statistics must stay current.
    autovacuum_vacuum_scale_factor = 0.5,
    autovacuum_analyze_scale_factor = 0.01
);

-- The latest recorded_at in each block of positions, since the times of a log do not always rise: clocks are set back.
-- With it, a start by time is found without a scan of the log. A block is added once the log goes on above it, and is
-- then final. service/event_log/times.py has a block's size.

CREATE TABLE log_times (
    block   bigint      NOT NULL PRIMARY KEY,
    latest  timestamptz NOT NULL                        -- -infinity if the block has no event
);

-- An event is never changed and never removed, not even during a restore (ENABLE ALWAYS), except that an erasure
-- empties its body, its address and a status word outside the vocabulary, which may be any text.

CREATE FUNCTION erased(state bytea) RETURNS bytea IMMUTABLE LANGUAGE plpgsql
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

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql
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

-- Processes of the previous release take the table's lock with this function. A later release will drop it.

CREATE FUNCTION lock_order_events() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    LOCK TABLE public.order_events IN ROW EXCLUSIVE MODE;
END $$;
REVOKE EXECUTE ON FUNCTION lock_order_events() FROM PUBLIC;

-- The views' names. The functions below create and rename the schemas of these views only.

CREATE TABLE view_names (
    view_name  text NOT NULL COLLATE "C" PRIMARY KEY
);

CREATE FUNCTION make_view_schema(name text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM public.view_names WHERE name IN (view_name, view_name || '_next')) THEN
        RAISE EXCEPTION '% is not the schema of a view', name USING ERRCODE = 'insufficient_privilege';
    END IF;
    EXECUTE format('CREATE SCHEMA %I', name);
    IF current_user = 'order_tracking_owner' THEN
        EXECUTE format('ALTER SCHEMA %I OWNER TO order_tracking_service', name);
    END IF;
END $$;
REVOKE EXECUTE ON FUNCTION make_view_schema(text) FROM PUBLIC;

CREATE FUNCTION swap_view_schemas(view text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM public.view_names WHERE view_name = view) THEN
        RAISE EXCEPTION '% is not a view', view USING ERRCODE = 'insufficient_privilege';
    END IF;
    EXECUTE format('ALTER SCHEMA %I RENAME TO %I', view, view || '_old');
    EXECUTE format('ALTER SCHEMA %I RENAME TO %I', view || '_next', view);
END $$;
REVOKE EXECUTE ON FUNCTION swap_view_schemas(text) FROM PUBLIC;

CREATE TRIGGER order_events_immutable BEFORE UPDATE OR DELETE ON order_events
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER order_events_kept BEFORE TRUNCATE ON order_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
ALTER TABLE order_events ENABLE ALWAYS TRIGGER order_events_immutable;
ALTER TABLE order_events ENABLE ALWAYS TRIGGER order_events_kept;

-- The log's id, by which a reader recognises that a position belongs to another log. apply_schema inserts the row, also
-- after a restore, since dumps leave it out: the restored log may lack events that readers have seen.

CREATE TABLE log_identity (
    log_id    uuid    NOT NULL DEFAULT gen_random_uuid(),
    one_row   boolean NOT NULL DEFAULT true PRIMARY KEY CHECK (one_row),
    moved_to  text                                     -- where the log goes on, after a move
);

------------------------------------------------------------------------------------------------------------
-- A sender's idempotency keys. The same key for the same order gets the first receipt again.

CREATE TABLE idempotency_keys (
    order_no     text   NOT NULL COLLATE "C",
    key          text   NOT NULL COLLATE "C",
    version      bigint NOT NULL,               -- of the event that was recorded with the key
    body_sha256  bytea  NOT NULL,               -- with another body, the report is an ordinary one; if the body was
                                                -- erased, of the reported status
    PRIMARY KEY (order_no, key),
    FOREIGN KEY (order_no, version) REFERENCES order_events (originator_id, originator_version)
);

------------------------------------------------------------------------------------------------------------
-- Unparseable bodies, kept byte for byte until an operator handles them.

CREATE TABLE quarantine (
    quarantine_id  bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    body           bytea,                               -- null after an erasure
    body_sha256    bytea       GENERATED ALWAYS AS (sha256(body)) STORED,
    reason         text        NOT NULL,                -- why it is unparseable
    remote         text,
    state          text        NOT NULL COLLATE "C" DEFAULT 'open' CHECK (state IN ('open', 'retried', 'discarded')),
    received_at    timestamptz NOT NULL,
    times_seen     bigint      NOT NULL DEFAULT 1 CHECK (times_seen > 0),
    last_seen_at   timestamptz NOT NULL,
    resolved_at    timestamptz,
    discard_reason text,
    order_no       text        COLLATE "C",             -- of the first event that a retry recorded
    version        bigint,
    named_order_no text        COLLATE "C",             -- that the body names, if it could be read
    CHECK (body IS NOT NULL OR state <> 'open'),
    CHECK ((state = 'open') = (resolved_at IS NULL)),
    CHECK ((state = 'discarded') = (discard_reason IS NOT NULL)),
    CHECK ((state = 'retried') = (version IS NOT NULL)),
    FOREIGN KEY (order_no, version) REFERENCES order_events (originator_id, originator_version)
);
-- Equal bodies share an open entry, until it has as many as a retry records in one transaction.
CREATE UNIQUE INDEX quarantine_shared_idx ON quarantine (body_sha256) WHERE state = 'open' AND times_seen < 1000;
-- Before a new body is kept, those of the last hour are counted.
CREATE INDEX quarantine_received_at_idx ON quarantine (received_at);
CREATE INDEX quarantine_order_idx ON quarantine (order_no, version);
CREATE INDEX quarantine_named_idx ON quarantine (named_order_no);
-- Finds the open bodies among all that were ever kept, to list and count them.
CREATE INDEX quarantine_state_idx ON quarantine (state, quarantine_id);

------------------------------------------------------------------------------------------------------------
-- API keys. Only the hash of a key's secret is kept.

CREATE TABLE api_keys (
    name           text        NOT NULL COLLATE "C" PRIMARY KEY,
    scope          text        NOT NULL CHECK (scope IN ('read', 'read:bodies', 'admin')),
    secret_sha256  bytea       NOT NULL UNIQUE CHECK (length(secret_sha256) = 32),
    created_at     timestamptz NOT NULL DEFAULT now(),
    expires_at     timestamptz,
    last_used_at   timestamptz,                         -- to the minute
    revoked_at     timestamptz                          -- permanent
);

-- The service may set revoked_at, but a stolen service role must not bring a key back.

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

-- Browser sessions. Only the hash of a session's id is kept, and a session is only as valid as its key.

CREATE TABLE sessions (
    session_sha256  bytea       NOT NULL PRIMARY KEY CHECK (length(session_sha256) = 32),
    key_name        text        NOT NULL COLLATE "C" REFERENCES api_keys (name),
    opened_at       timestamptz NOT NULL DEFAULT now(),
    used_at         timestamptz NOT NULL DEFAULT now()  -- to the minute
);

------------------------------------------------------------------------------------------------------------
-- What operators did. The service can add rows, but neither change nor remove any.

CREATE TABLE operations (
    operation_id  bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    performed_at  timestamptz NOT NULL DEFAULT now(),
    via           text        NOT NULL,                 -- api, page, cli or service
    actor         text,                                 -- the API key's name, or the user of the operating system
    action        text        NOT NULL,
    subject       text        NOT NULL,                 -- the key, entry, order or setting
    reason        text
);

-- Contradictions that an operator has handled, each with the operation that recorded who, when and why.

CREATE TABLE handled_contradictions (
    order_no      text   NOT NULL COLLATE "C",
    version       bigint NOT NULL,
    operation_id  bigint NOT NULL REFERENCES operations (operation_id),
    PRIMARY KEY (order_no, version)
);

-- Share links that were revoked before their expiry. A link itself is stored nowhere: its id is a hash of its token.

CREATE TABLE revoked_shares (
    share_id    text        NOT NULL COLLATE "C" PRIMARY KEY,
    revoked_at  timestamptz NOT NULL DEFAULT now()
);

------------------------------------------------------------------------------------------------------------
-- Subscriptions: endpoints of the shop to which order events are sent. A subscription is a position in the log.

CREATE TABLE subscriptions (
    subscription_id        uuid        NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
    url                    text        NOT NULL,
    verdicts               text[]      NOT NULL,          -- of the events to send; empty for all
    statuses               text[]      NOT NULL,          -- the same
    include                text[]      NOT NULL,          -- what else the body has
    secret                 text        NOT NULL,
    previous_secret        text,                          -- still signs, until the time below
    previous_secret_until  timestamptz,
    state                  text        NOT NULL COLLATE "C" DEFAULT 'active'
        CHECK (state IN ('active', 'paused', 'disabled')),
    state_reason           text,                          -- why it is not active
    created_at             timestamptz NOT NULL DEFAULT now(),
    revision               bigint      NOT NULL DEFAULT 1,  -- higher after each change of an operator
    generation             bigint      NOT NULL DEFAULT 1,  -- higher with each new deliverer, and after a replay: one
                                                          -- with a lower number may not save
    log_id                 uuid        NOT NULL,          -- the log of the position
    position               bigint      NOT NULL,          -- every event up to it is done, or its order is held
    report_id              text,                          -- of the event at the position, if it was read
    delivered              bigint      NOT NULL DEFAULT 0,  -- the number of successful attempts
    failed                 bigint      NOT NULL DEFAULT 0,  -- the number of the others
    down_since             timestamptz,                   -- if all recent attempts have failed
    responses              json        NOT NULL DEFAULT '[]'  -- the latest ones
) WITH (
    -- The position moves with every few deliveries.
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0.02
);

-- The orders with an undelivered event. Their later events wait behind it, up to the subscription's position.

CREATE TABLE held_orders (
    held_id          bigint      GENERATED ALWAYS AS IDENTITY,
    subscription_id  uuid        NOT NULL REFERENCES subscriptions (subscription_id) ON DELETE CASCADE,
    order_no         text        NOT NULL COLLATE "C",
    version          bigint      NOT NULL,                -- of the undelivered event
    position         bigint      NOT NULL,                -- the same
    held_since       timestamptz NOT NULL,
    attempts         integer     NOT NULL,                -- at this event
    last_attempt_at  timestamptz,
    next_attempt_at  timestamptz,                         -- null after the last attempt: an operator must act
    last_error       text,
    retry_requested  boolean     NOT NULL DEFAULT false,  -- by an operator, until the deliverer knows
    skip_version     bigint,                              -- the same: the version to give up
    PRIMARY KEY (subscription_id, order_no)
);
CREATE INDEX held_orders_list_idx ON held_orders (subscription_id, held_id);

------------------------------------------------------------------------------------------------------------
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

------------------------------------------------------------------------------------------------------------
-- Erasure: the one way in which an event's bytes change. The owner removes the body and the address. The verdicts and
-- times stay, so every view and every audit stays the same.

CREATE TABLE erasures (
    erasure_id  bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_no    text        NOT NULL COLLATE "C",
    erased_at   timestamptz NOT NULL DEFAULT now(),
    erased_by   text        NOT NULL DEFAULT session_user,
    reason      text        NOT NULL CHECK (reason <> ''),
    events      bigint      NOT NULL,                   -- the number of emptied events
    entries     bigint      NOT NULL,                   -- the number of emptied quarantined bodies
    version     bigint                                  -- of the last emptied event
);
-- The retention looks up whether an order's reports were erased.
CREATE INDEX erasures_order_no_idx ON erasures (order_no, erased_at);

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
CREATE PROCEDURE erase_order(erased_order_no text, erasure_reason text, last_version bigint DEFAULT NULL)
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
REVOKE EXECUTE ON PROCEDURE erase_order(text, text, bigint) FROM PUBLIC;

------------------------------------------------------------------------------------------------------------
-- The service's rights. It may choose neither an event's position nor recorded_at.

DO $$
BEGIN
    IF current_user <> 'order_tracking_owner' THEN
        RETURN;
    END IF;
    GRANT SELECT ON schema_version, view_names, order_events, idempotency_keys, quarantine, api_keys, sessions,
        operations, handled_contradictions, revoked_shares, erasures, log_identity, subscriptions, held_orders,
        history_trees, history_tiles, history_salts, history_commitments, history_checkpoints
        TO order_tracking_service;
    GRANT INSERT (originator_id, originator_version, topic, state) ON order_events TO order_tracking_service;
    GRANT EXECUTE ON FUNCTION lock_order_events(), make_view_schema(text), swap_view_schemas(text)
        TO order_tracking_service;
    GRANT SELECT, INSERT ON log_times TO order_tracking_service;
    GRANT INSERT ON idempotency_keys TO order_tracking_service;
    GRANT INSERT (body, reason, remote, received_at, last_seen_at, named_order_no) ON quarantine
        TO order_tracking_service;
    GRANT UPDATE (times_seen, last_seen_at, state, resolved_at, discard_reason, order_no, version) ON quarantine
        TO order_tracking_service;
    GRANT INSERT, UPDATE (last_used_at, revoked_at) ON api_keys TO order_tracking_service;
    GRANT INSERT, DELETE, UPDATE (used_at) ON sessions TO order_tracking_service;
    GRANT INSERT (via, actor, action, subject, reason) ON operations TO order_tracking_service;
    GRANT INSERT ON handled_contradictions TO order_tracking_service;
    GRANT INSERT (share_id) ON revoked_shares TO order_tracking_service;
    GRANT INSERT, DELETE, UPDATE ON subscriptions, held_orders TO order_tracking_service;
    GRANT INSERT (tree, header) ON history_trees TO order_tracking_service;
    GRANT INSERT, UPDATE (hashes) ON history_tiles TO order_tracking_service;
    GRANT INSERT, UPDATE (salts) ON history_salts TO order_tracking_service;
    GRANT UPDATE (commitment, raw) ON history_commitments TO order_tracking_service;
    GRANT INSERT, UPDATE (size, note) ON history_checkpoints TO order_tracking_service;
    -- For a backup.
    GRANT SELECT ON ALL SEQUENCES IN SCHEMA public TO order_tracking_service;
END $$;

------------------------------------------------------------------------------------------------------------
-- The views. Each is a schema with the tables of its own section and of the section "in every view". Names are not
-- qualified, so that a rebuild can create the tables a second time beside the live ones. Only the view's projection
-- writes them. A view is never migrated: if its section or its fold changes, it is rebuilt at start. A rebuild runs the
-- statements after the line "-- indexes" last, when all rows are there.

-- in every view

-- The position that the view has reached, the last erasure that it has applied, and the hash of the definition that made
-- it.
CREATE TABLE projection (
    position    bigint NOT NULL,
    erasure_id  bigint NOT NULL DEFAULT 0,
    definition  text   NOT NULL,
    one_row     boolean NOT NULL DEFAULT true PRIMARY KEY CHECK (one_row)
);

-- Orders with an event that the view could not apply. From that event on they wait for a replay.
CREATE TABLE parked_orders (
    order_no       text   NOT NULL COLLATE "C" PRIMARY KEY,
    since_version  bigint NOT NULL,
    position       bigint NOT NULL,
    reason         text   NOT NULL
);

-- view current_status

CREATE TABLE orders (
    order_no           text        NOT NULL COLLATE "C",
    version            bigint      NOT NULL,       -- of the last event
    position           bigint      NOT NULL,       -- of the last event
    first_position     bigint      NOT NULL,       -- of the first event; lists are ordered by it
    status             text        COLLATE "C",       -- null until a report advanced
    reported_status    text,                       -- the string that brought the status
    status_since       timestamptz,
    cnote              text,
    first_reported_at  timestamptz NOT NULL,
    last_reported_at   timestamptz NOT NULL,
    submitted_at       timestamptz,                -- of the first report that advanced the order to the status
    picked_up_at       timestamptz,
    shipped_at         timestamptz,                -- to in_transit
    delivered_at       timestamptz,
    delivery_attempts  bigint      NOT NULL,       -- how often the order advanced to out_for_delivery
    advanced           bigint      NOT NULL,       -- the number of reports with each verdict
    repeated           bigint      NOT NULL,
    late               bigint      NOT NULL,
    refused            bigint      NOT NULL,
    unrecognised       bigint      NOT NULL,
    rejudgements       bigint      NOT NULL,       -- unrecognised reports that were judged again
    -- One report, one event: the version is the number of reports and of rejudgements.
    CHECK (version = advanced + repeated + late + refused + unrecognised + rejudgements),
    CHECK (rejudgements <= unrecognised),
    CHECK (status IS NOT NULL OR advanced = 0),
    CHECK (status IS NULL OR advanced + rejudgements > 0),
    PRIMARY KEY (order_no)
) WITH (
    -- Each report updates its order's row. By default, a fifth of a large table would be dead before it is cleaned.
    autovacuum_vacuum_scale_factor = 0.02
);

-- Every airway bill that was ever reported of an order.
CREATE TABLE order_cnotes (
    cnote     text NOT NULL COLLATE "C",
    order_no  text NOT NULL COLLATE "C",
    PRIMARY KEY (cnote, order_no)
);

-- indexes
-- The list by first report, and the list by last report: all orders, those with a status, and those with a refused
-- report, which are few. A null status would have no order.
CREATE INDEX orders_first_position_idx ON orders (first_position);
CREATE INDEX orders_updated_idx ON orders (last_reported_at, position);
CREATE INDEX orders_status_idx ON orders (coalesce(status, ''), last_reported_at, position);
CREATE INDEX orders_refused_idx ON orders (last_reported_at, position) WHERE refused > 0;
-- A search looks up whether an order has an airway bill that begins with a text.
CREATE INDEX order_cnotes_order_no_idx ON order_cnotes (order_no, cnote);

-- view timeline

-- One row for each event, for the timeline and the audit.
CREATE TABLE entries (
    order_no         text        NOT NULL COLLATE "C",
    version          bigint      NOT NULL,
    position         bigint      NOT NULL,
    verdict          text        NOT NULL,
    previous_status  text,
    recognised       text,                         -- the reported status; null outside the vocabulary
    status           text,                         -- the order's, after the report
    reported_status  text        NOT NULL,
    reported_cnote   text,
    skipped          text[]      NOT NULL,
    reason           text,
    received_at      timestamptz NOT NULL,
    occurred_at      timestamptz,
    repeats          bigint,                       -- the version of the entry that this report repeats
    rejudges         bigint,                       -- the version of the report that this one judges again
    reported_at      timestamptz,                  -- when that report arrived
    kind             smallint    NOT NULL,         -- stands for verdict, previous_status and recognised together
    PRIMARY KEY (order_no, version)
);

-- The earliest and the latest arrival of the reports in a block of positions. The audit by time skips the other blocks.
CREATE TABLE blocks (
    block     bigint      NOT NULL PRIMARY KEY,
    earliest  timestamptz NOT NULL,
    latest    timestamptz NOT NULL
);

-- Status strings outside the vocabulary.
CREATE TABLE unrecognised (
    reported_status   text        NOT NULL COLLATE "C" PRIMARY KEY,
    reports           bigint      NOT NULL,
    rejudged          bigint      NOT NULL,        -- how many of these reports were judged again
    last_received_at  timestamptz                  -- null if an erasure has emptied the word in all reports
);

-- indexes
CREATE UNIQUE INDEX entries_position_idx ON entries (position);
-- The contradictions, which are few.
CREATE INDEX entries_refused_idx ON entries (position) WHERE verdict = 'refused';
-- A page of a timeline counts its repeats with this index. Most orders have none.
CREATE INDEX entries_repeats_idx ON entries (order_no, repeats) WHERE repeats IS NOT NULL;
-- The audit by verdict, by status before the report and by reported status, in every combination.
CREATE INDEX entries_kind_idx ON entries (kind, position);

-- view statistics

-- The number of orders with each status; '' stands for orders without one.
CREATE TABLE statuses (
    status  text   NOT NULL COLLATE "C" PRIMARY KEY,
    orders  bigint NOT NULL
);

-- How often orders moved from one status to another, by how long they had been in the first: each bucket of time is a
-- tenth wider than the previous one.
CREATE TABLE moves (
    previous_status  text    NOT NULL COLLATE "C",
    status           text    NOT NULL COLLATE "C",
    bucket           integer NOT NULL,
    times            bigint  NOT NULL,
    PRIMARY KEY (previous_status, status, bucket)
);

-- The number of reports by hour and by verdict. A reader sums them up by day in its own time zone.
CREATE TABLE hours (
    hour     timestamptz NOT NULL,
    verdict  text        NOT NULL COLLATE "C",
    reports  bigint      NOT NULL,
    PRIMARY KEY (hour, verdict)
);

-- The number of reports by minute and by verdict, of the latest minute of each slot. The minutes of two hours have
-- different slots, so the table has at most 120 rows for each verdict.
CREATE TABLE minutes (
    slot     smallint    NOT NULL,                 -- minutes since 1970, modulo 120
    verdict  text        NOT NULL COLLATE "C",
    minute   timestamptz NOT NULL,
    reports  bigint      NOT NULL,
    PRIMARY KEY (slot, verdict)
);

-- end of views
