-- Contradictions that an operator has handled, each with the operation that recorded who, when and why.
CREATE TABLE handled_contradictions (
    order_no      text   NOT NULL COLLATE "C",
    version       bigint NOT NULL,
    operation_id  bigint NOT NULL REFERENCES operations (operation_id),
    PRIMARY KEY (order_no, version)
);
DO $$
BEGIN
    IF current_user = 'order_tracking_owner' THEN
        GRANT SELECT, INSERT ON handled_contradictions TO order_tracking_service;
    END IF;
END $$;
