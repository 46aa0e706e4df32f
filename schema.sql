-- The whole present schema, applied once, in one transaction, to a database that has no schema_version row.
-- Plain CREATEs: IF NOT EXISTS would hide a wrong shape. Later releases add service/migrations/.

CREATE TABLE schema_version (
    version     integer     NOT NULL PRIMARY KEY,
    applied_at  timestamptz NOT NULL DEFAULT now()
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
-- Bodies that could not be understood, byte for byte. Equal bodies share an entry.

CREATE TABLE quarantine (
    quarantine_id  bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    body           bytea       NOT NULL,
    body_sha256    bytea       GENERATED ALWAYS AS (sha256(body)) STORED UNIQUE,
    reason         text        NOT NULL,
    remote         text,
    state          text        NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'retried', 'discarded')),
    received_at    timestamptz NOT NULL,
    times_seen     bigint      NOT NULL DEFAULT 1 CHECK (times_seen > 0),
    last_seen_at   timestamptz NOT NULL
);

------------------------------------------------------------------------------------------------------------
-- The views. Each is a schema of its own, made from its section below by names that are not qualified, so
-- that a rebuild can make it once more beside the live one. Nothing but its projection writes it. It is never
-- migrated: where its section or its fold has changed, it is rebuilt. What stands after the line "-- keys" is
-- made last by a rebuild, after the rows.

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

-- How far this view has read the log, and by which definition it was made.
CREATE TABLE projection (
    position    bigint NOT NULL,
    definition  text   NOT NULL,
    one_row     boolean NOT NULL DEFAULT true PRIMARY KEY CHECK (one_row)
);

-- Orders with an event that this view could not handle: they wait, from that event on, for a rebuild.
CREATE TABLE set_aside (
    order_no       text   NOT NULL COLLATE "C" PRIMARY KEY,
    since_version  bigint NOT NULL,
    position       bigint NOT NULL,
    reason         text   NOT NULL
);

-- keys
ALTER TABLE orders ADD PRIMARY KEY (order_no);
CREATE INDEX orders_first_position_idx ON orders (first_position);
CREATE INDEX orders_status_idx ON orders (status, first_position);
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

CREATE TABLE projection (
    position    bigint NOT NULL,
    definition  text   NOT NULL,
    one_row     boolean NOT NULL DEFAULT true PRIMARY KEY CHECK (one_row)
);

CREATE TABLE set_aside (
    order_no       text   NOT NULL COLLATE "C" PRIMARY KEY,
    since_version  bigint NOT NULL,
    position       bigint NOT NULL,
    reason         text   NOT NULL
);

-- keys
ALTER TABLE entries ADD PRIMARY KEY (order_no, version);
CREATE UNIQUE INDEX entries_position_idx ON entries (position);
-- A page of a timeline counts its repeats through this; most orders have none.
CREATE INDEX entries_repeats_idx ON entries (order_no, repeats) WHERE repeats IS NOT NULL;

-- end of views
