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
DO $$
BEGIN
    IF current_user = 'order_tracking_owner' THEN
        GRANT SELECT, INSERT, DELETE, UPDATE ON subscriptions, held_orders TO order_tracking_service;
        GRANT SELECT ON ALL SEQUENCES IN SCHEMA public TO order_tracking_service;
    END IF;
END $$;
