-- The log's id, by which a reader recognises that a position belongs to another log. The service inserts the row.
CREATE TABLE log_identity (
    log_id   uuid    NOT NULL DEFAULT gen_random_uuid(),
    one_row  boolean NOT NULL DEFAULT true PRIMARY KEY CHECK (one_row)
);
DO $$
BEGIN
    IF current_user = 'order_tracking_owner' THEN
        GRANT SELECT ON log_identity TO order_tracking_service;
    END IF;
END $$;
