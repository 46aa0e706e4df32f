-- The latest recorded_at in each block of positions, for a start by time. The service fills it in the background.
CREATE TABLE log_times (
    block   bigint      NOT NULL PRIMARY KEY,
    latest  timestamptz NOT NULL                        -- -infinity if the block has no event
);
DO $$
BEGIN
    IF current_user = 'order_tracking_owner' THEN
        GRANT SELECT, INSERT ON log_times TO order_tracking_service;
    END IF;
END $$;
