-- The whole present schema, applied once, in one transaction, to a database that has no schema_version row.
-- Plain CREATEs: IF NOT EXISTS would hide a wrong shape. Every change here has a migration in service/database/migrations/.

------------------------------------------------------------------------------------------------------------
-- Three roles, of the whole server: the owner of the log, who migrates it and erases from it; the service, which
-- can add to the log and never change it, and owns the views; and a reader, for people and reports. Where whoever
-- applies this may not make roles, it is the one role, owns everything, and "check" says what that leaves open.

DO $$
DECLARE
    wanted text;
BEGIN
    IF NOT (SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user) THEN
        RETURN;
    END IF;
    FOREACH wanted IN ARRAY ARRAY['order_tracking_owner', 'order_tracking_service', 'order_tracking_reader'] LOOP
        BEGIN
            -- Without a password: by one that is given to it later, or over a socket that trusts.
            EXECUTE format('CREATE ROLE %I %s', wanted,
                CASE wanted WHEN 'order_tracking_service' THEN 'LOGIN' ELSE 'NOLOGIN' END);
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL;  -- another database of this server has made it
        END;
        -- A superuser may act as anybody; others must be members, and may be refused that for another's role.
        BEGIN
            IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
                EXECUTE format('GRANT %I TO CURRENT_USER', wanted);
            END IF;
        EXCEPTION WHEN insufficient_privilege THEN
            RETURN;
        END;
    END LOOP;
    GRANT USAGE, CREATE ON SCHEMA public TO order_tracking_owner;
    GRANT USAGE ON SCHEMA public TO order_tracking_service, order_tracking_reader;
    REVOKE CREATE ON SCHEMA public FROM PUBLIC;
    -- The owner makes the views' schemas for the service. The service itself makes none: a schema of the name of a
    -- role comes first on that role's search path, and what is in it would be run by whoever acts as that role.
    EXECUTE format('GRANT CREATE ON DATABASE %I TO order_tracking_owner', current_database());
    GRANT order_tracking_service TO order_tracking_owner;
    ALTER DEFAULT PRIVILEGES FOR ROLE order_tracking_service GRANT SELECT ON TABLES TO order_tracking_reader;
    PERFORM set_config('role', 'order_tracking_owner', true);
END $$;

CREATE TABLE schema_version (
    version     integer     NOT NULL PRIMARY KEY,
    applied_at  timestamptz NOT NULL DEFAULT now(),
    sha256      text                                    -- of the migration's file
);

------------------------------------------------------------------------------------------------------------
-- The log. One row an event, one event a report. Laid out as eventsourcing's own PostgreSQL recorder lays out
-- the events of an application named "order" with text ids; recorded_at is ours.
-- No CHECK on version, topic or state: what may stand there is the library's business as much as ours.

CREATE TABLE order_events (
    originator_id       text        NOT NULL COLLATE "C",       -- the order number, as the sender wrote it
    originator_version  bigint      NOT NULL,                   -- 1, 2, 3, ... for each order
    topic               text        NOT NULL,
    state               bytea       NOT NULL,
    notification_id     bigint      GENERATED ALWAYS AS IDENTITY,  -- the position; gaps mean nothing
    recorded_at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Two writers cannot both record an order's next version: whoever judged from a stale state is refused.
    CONSTRAINT order_events_pkey PRIMARY KEY (originator_id, originator_version),
    CONSTRAINT order_events_notification_id_idx UNIQUE (notification_id)
) WITH (
    -- Append-only: there is nothing to vacuum but what a refused batch left, and much to analyse.
    autovacuum_vacuum_scale_factor = 0.5,
    autovacuum_analyze_scale_factor = 0.01
);

-- An event is never changed and never removed, by nobody, not even during a restore (ENABLE ALWAYS).

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% of % is refused: events are immutable', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'integrity_constraint_violation';
END $$;

-- The lock-first append takes the table's lock before anything else, as the library's own recorder does. A grant
-- on columns gives no right to LOCK TABLE, so this function lends it, and nothing more.

CREATE FUNCTION lock_order_events() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    LOCK TABLE public.order_events IN ROW EXCLUSIVE MODE;
END $$;
REVOKE EXECUTE ON FUNCTION lock_order_events() FROM PUBLIC;

-- The schemas that a view and its rebuild may have, and no others.

CREATE FUNCTION make_view_schema(name text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF name !~ '^(current_status|timeline|statistics)(_next)?$' THEN
        RAISE EXCEPTION '% is no schema of a view', name USING ERRCODE = 'insufficient_privilege';
    END IF;
    EXECUTE format('CREATE SCHEMA %I', name);
    IF current_user = 'order_tracking_owner' THEN
        EXECUTE format('ALTER SCHEMA %I OWNER TO order_tracking_service', name);
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO order_tracking_reader', name);
    END IF;
END $$;
REVOKE EXECUTE ON FUNCTION make_view_schema(text) FROM PUBLIC;

CREATE FUNCTION swap_view_schemas(view text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF view !~ '^(current_status|timeline|statistics)$' THEN
        RAISE EXCEPTION '% is no view', view USING ERRCODE = 'insufficient_privilege';
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

------------------------------------------------------------------------------------------------------------
-- A sender's idempotency key, where it sends one: the same key for the same order gets the first receipt.

CREATE TABLE idempotency_keys (
    order_no     text   NOT NULL COLLATE "C",
    key          text   NOT NULL COLLATE "C",
    version      bigint NOT NULL,               -- of the event that the key brought
    body_sha256  bytea  NOT NULL,               -- the same key with another body is an ordinary report
    PRIMARY KEY (order_no, key),
    FOREIGN KEY (order_no, version) REFERENCES order_events (originator_id, originator_version)
);

------------------------------------------------------------------------------------------------------------
-- Bodies that could not be understood, byte for byte, until somebody deals with them. Equal bodies share an entry.

CREATE TABLE quarantine (
    quarantine_id  bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    body           bytea,                               -- null once it is erased
    body_sha256    bytea       GENERATED ALWAYS AS (sha256(body)) STORED UNIQUE,
    reason         text        NOT NULL,                -- why it could not be understood
    remote         text,
    state          text        NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'retried', 'discarded')),
    received_at    timestamptz NOT NULL,
    times_seen     bigint      NOT NULL DEFAULT 1 CHECK (times_seen > 0),
    last_seen_at   timestamptz NOT NULL,
    resolved_at    timestamptz,
    resolution     text,                                -- why it was discarded
    order_no       text        COLLATE "C",             -- the event that a retry made
    version        bigint,
    CHECK (body IS NOT NULL OR state <> 'open'),
    CHECK ((state = 'open') = (resolved_at IS NULL)),
    CHECK ((state = 'discarded') = (resolution IS NOT NULL)),
    CHECK ((state = 'retried') = (version IS NOT NULL)),
    FOREIGN KEY (order_no, version) REFERENCES order_events (originator_id, originator_version)
);
-- How many were kept within the hour is counted before each that is new.
CREATE INDEX quarantine_received_at_idx ON quarantine (received_at);
CREATE INDEX quarantine_order_idx ON quarantine (order_no, version);
-- What is open is looked at, and counted, among all that ever was.
CREATE INDEX quarantine_state_idx ON quarantine (state, quarantine_id);

------------------------------------------------------------------------------------------------------------
-- Who may read and operate. Of a key's secret only the hash is kept.

CREATE TABLE api_keys (
    name           text        NOT NULL PRIMARY KEY,
    scope          text        NOT NULL CHECK (scope IN ('read', 'admin')),
    secret_sha256  bytea       NOT NULL UNIQUE CHECK (length(secret_sha256) = 32),
    created_at     timestamptz NOT NULL DEFAULT now(),
    expires_at     timestamptz,
    last_used_at   timestamptz,                         -- to the minute
    revoked_at     timestamptz
);

------------------------------------------------------------------------------------------------------------
-- Erasure. The one way in which an event's bytes change: the owner takes out what a sender wrote beyond the
-- members that are judged. What was judged, when and how stays, so every view and every audit stays the same.

CREATE TABLE erasures (
    erasure_id  bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_no    text        NOT NULL COLLATE "C",
    erased_at   timestamptz NOT NULL DEFAULT now(),
    erased_by   text        NOT NULL DEFAULT session_user,
    why         text        NOT NULL CHECK (why <> ''),
    events      bigint      NOT NULL,                   -- how many events and
    entries     bigint      NOT NULL                    -- quarantine entries it emptied
);

-- Runs as its caller, who must own the log: nobody else can switch the triggers. The lock that this takes lets
-- reads pass, and holds webhooks up for as long as one order's events take.
CREATE PROCEDURE erase_order(erased_order_no text, why text) LANGUAGE plpgsql
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
    INSERT INTO erasures (order_no, why, events, entries) VALUES (erased_order_no, why, events, entries);
END $$;
REVOKE EXECUTE ON PROCEDURE erase_order(text, text) FROM PUBLIC;

------------------------------------------------------------------------------------------------------------
-- What the service and the reader may do. Position and recorded_at are not the service's to give.

DO $$
BEGIN
    IF current_user <> 'order_tracking_owner' THEN
        RETURN;
    END IF;
    GRANT SELECT ON schema_version, order_events, idempotency_keys, quarantine, api_keys, erasures
        TO order_tracking_service;
    GRANT INSERT (originator_id, originator_version, topic, state) ON order_events TO order_tracking_service;
    GRANT EXECUTE ON FUNCTION lock_order_events(), make_view_schema(text), swap_view_schemas(text)
        TO order_tracking_service;
    GRANT INSERT ON idempotency_keys TO order_tracking_service;
    GRANT INSERT (body, reason, remote, received_at, last_seen_at) ON quarantine TO order_tracking_service;
    GRANT UPDATE (times_seen, last_seen_at, state, resolved_at, resolution, order_no, version) ON quarantine
        TO order_tracking_service;
    GRANT INSERT, UPDATE (last_used_at, revoked_at) ON api_keys TO order_tracking_service;
    -- To make a backup.
    GRANT SELECT ON ALL SEQUENCES IN SCHEMA public TO order_tracking_service;
    GRANT SELECT ON order_events TO order_tracking_reader;
END $$;

------------------------------------------------------------------------------------------------------------
-- The views. Each is a schema of its own, made from its section below, and from what is in every view, by names
-- that are not qualified, so that a rebuild can make it once more beside the live one. Nothing but its projection
-- writes it. It is never migrated: where its section or its fold has changed, it is rebuilt. What stands after the
-- line "-- keys" is made last by a rebuild, after the rows.

-- in every view

-- How far the view has read the log, and by which definition it was made.
CREATE TABLE projection (
    position    bigint NOT NULL,
    definition  text   NOT NULL,
    one_row     boolean NOT NULL DEFAULT true PRIMARY KEY CHECK (one_row)
);

-- Orders with an event that the view could not handle: they wait, from that event on, for a rebuild.
CREATE TABLE set_aside (
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
    first_position     bigint      NOT NULL,       -- of the first event: lists are ordered by it
    status             text,                       -- null until something advanced
    reported_status    text,                       -- the string that gave the status
    status_since       timestamptz,
    cnote              text,
    first_reported_at  timestamptz NOT NULL,
    last_reported_at   timestamptz NOT NULL,
    advanced           bigint      NOT NULL,       -- how many reports had each verdict
    repeated           bigint      NOT NULL,
    late               bigint      NOT NULL,
    refused            bigint      NOT NULL,
    unrecognised       bigint      NOT NULL,
    -- One report, one event: the version is the number of reports.
    CHECK (version = advanced + repeated + late + refused + unrecognised),
    CHECK ((status IS NULL) = (advanced = 0))
);

-- Every airway bill that was ever reported of an order.
CREATE TABLE order_cnotes (
    cnote     text NOT NULL COLLATE "C",
    order_no  text NOT NULL COLLATE "C"
);

-- keys
ALTER TABLE orders ADD PRIMARY KEY (order_no);
CREATE INDEX orders_first_position_idx ON orders (first_position);
-- One for each way in which orders are looked for; those of rare orders hold nothing of the others.
CREATE INDEX orders_status_idx ON orders (status, first_position);
CREATE INDEX orders_repeated_idx ON orders (first_position) WHERE repeated > 0;
CREATE INDEX orders_late_idx ON orders (first_position) WHERE late > 0;
CREATE INDEX orders_refused_idx ON orders (first_position) WHERE refused > 0;
CREATE INDEX orders_unrecognised_idx ON orders (first_position) WHERE unrecognised > 0;
CREATE INDEX orders_last_reported_idx ON orders (last_reported_at);
CREATE INDEX orders_unsettled_idx ON orders (last_reported_at)
    WHERE status IS NULL OR status NOT IN ('delivered', 'completed', 'returned', 'cancelled', 'lost', 'damaged');
ALTER TABLE order_cnotes ADD PRIMARY KEY (cnote, order_no);

-- view timeline

-- One row an event: it serves the timeline and the audit alike.
CREATE TABLE entries (
    order_no         text        NOT NULL COLLATE "C",
    version          bigint      NOT NULL,
    position         bigint      NOT NULL,
    verdict          text        NOT NULL,
    previous_status  text,
    recognised       text,                         -- what the reported string meant; null outside the vocabulary
    status           text,                         -- the order's, after the report
    reported_status  text        NOT NULL,
    reported_cnote   text,
    skipped          text[]      NOT NULL,
    reason           text,
    received_at      timestamptz NOT NULL,
    occurred_at      timestamptz,
    repeats          bigint                        -- the version whose entry this one folds into
);

-- keys
ALTER TABLE entries ADD PRIMARY KEY (order_no, version);
CREATE UNIQUE INDEX entries_position_idx ON entries (position);
-- A page of a timeline counts its repeats through this; most orders have none.
CREATE INDEX entries_repeats_idx ON entries (order_no, repeats) WHERE repeats IS NOT NULL;
-- The audit by what is rare, and by time: received_at goes on with the position, so a summary of each block will do.
CREATE INDEX entries_verdict_idx ON entries (verdict, position) WHERE verdict <> 'advanced';
CREATE INDEX entries_received_idx ON entries USING brin (received_at) WITH (pages_per_range = 32);

-- view statistics

-- Orders by what their status is; '' where they have none yet.
CREATE TABLE statuses (
    status  text   NOT NULL,
    orders  bigint NOT NULL
);

-- How often orders went from one status to another, by how long they had been in the first: buckets of time, each
-- a tenth wider than the one before it.
CREATE TABLE moves (
    previous_status  text    NOT NULL,
    status           text    NOT NULL,
    bucket           integer NOT NULL,
    times            bigint  NOT NULL
);

-- Reports by verdict and day, in UTC.
CREATE TABLE days (
    day      date   NOT NULL,
    verdict  text   NOT NULL,
    reports  bigint NOT NULL
);

-- What the vocabulary does not have.
CREATE TABLE unrecognised (
    reported_status   text        NOT NULL COLLATE "C",
    reports           bigint      NOT NULL,
    last_received_at  timestamptz NOT NULL
);

-- keys
ALTER TABLE statuses ADD PRIMARY KEY (status);
ALTER TABLE moves ADD PRIMARY KEY (previous_status, status, bucket);
ALTER TABLE days ADD PRIMARY KEY (day, verdict);
ALTER TABLE unrecognised ADD PRIMARY KEY (reported_status);

-- end of views
