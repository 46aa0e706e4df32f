-- No part of the service uses the role order_tracking_reader. It loses its rights here, and stays: it is the server's.
DO $$
BEGIN
    IF current_user = 'order_tracking_owner'
        AND EXISTS (SELECT FROM pg_roles WHERE rolname = 'order_tracking_reader') THEN
        REVOKE SELECT ON order_events FROM order_tracking_reader;
        ALTER DEFAULT PRIVILEGES FOR ROLE order_tracking_service REVOKE SELECT ON TABLES FROM order_tracking_reader;
    END IF;
END $$;
