-- Share links that were revoked before their expiry. A link itself is stored nowhere: its id is a hash of its token.

CREATE TABLE revoked_shares (
    share_id    text        NOT NULL COLLATE "C" PRIMARY KEY,
    revoked_at  timestamptz NOT NULL DEFAULT now()
);

-- Earlier releases made links without a record, and by default without an expiry.
INSERT INTO operations (via, actor, action, subject, reason) VALUES (
    'service', 'migration', 'shares_kept', 'share links',
    'links made before stay valid, those without an expiry permanently: revoke one, or change the share secret'
);

DO $$
BEGIN
    IF current_user = 'order_tracking_owner' THEN
        GRANT SELECT ON revoked_shares TO order_tracking_service;
        GRANT INSERT (share_id) ON revoked_shares TO order_tracking_service;
    END IF;
END $$;
