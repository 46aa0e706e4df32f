-- No part of the service uses the role order_tracking_reader. It loses its rights here; the role itself stays, since it
-- belongs to the whole server.
DO $$
BEGIN
    IF current_user = 'order_tracking_owner'
        AND EXISTS (SELECT FROM pg_roles WHERE rolname = 'order_tracking_reader') THEN
        REVOKE SELECT ON order_events FROM order_tracking_reader;
        ALTER DEFAULT PRIVILEGES FOR ROLE order_tracking_service REVOKE SELECT ON TABLES FROM order_tracking_reader;
        -- The role that applied schema.sql granted this right, and only that role can revoke it.
        PERFORM set_config('role', 'none', true);
        REVOKE USAGE ON SCHEMA public FROM order_tracking_reader;
    END IF;
END $$;
