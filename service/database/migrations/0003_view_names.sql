-- The views' names move from regular expressions into a table, so that a new view needs one row.
CREATE TABLE view_names (
    view_name  text NOT NULL PRIMARY KEY
);
INSERT INTO view_names VALUES ('current_status'), ('timeline'), ('statistics');

CREATE OR REPLACE FUNCTION make_view_schema(name text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
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

CREATE OR REPLACE FUNCTION swap_view_schemas(view text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM public.view_names WHERE view_name = view) THEN
        RAISE EXCEPTION '% is not a view', view USING ERRCODE = 'insufficient_privilege';
    END IF;
    EXECUTE format('ALTER SCHEMA %I RENAME TO %I', view, view || '_old');
    EXECUTE format('ALTER SCHEMA %I RENAME TO %I', view || '_next', view);
END $$;

DO $$
BEGIN
    IF current_user = 'order_tracking_owner' THEN
        GRANT SELECT ON view_names TO order_tracking_service;
    END IF;
END $$;
