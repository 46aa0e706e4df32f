"""The objects of a database's log schema, one line each, to compare the schema with a release's."""

from collections.abc import Sequence
from typing import Final

from projections.postgres_errors import Connection

# Tables, columns, constraints, indexes, triggers and functions of the schema public. Each line names one object
# and describes it in text that is the same in PostgreSQL 15 to 18; NOT NULL is part of its column's line.
CATALOG: Final = """
    WITH tables AS (
        SELECT oid, relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
    )
    SELECT format('column %s.%s', relname, attname),
        format('%s%s%s%s%s%s', format_type(atttypid, atttypmod),
            CASE WHEN collname <> 'default' THEN ' COLLATE ' || collname::text END,
            CASE WHEN attnotnull THEN ' NOT NULL' END,
            CASE WHEN attidentity <> '' THEN ' IDENTITY ' || attidentity::text END,
            CASE WHEN attgenerated <> '' THEN ' GENERATED' END,
            ' DEFAULT ' || pg_get_expr(adbin, adrelid))
    FROM tables JOIN pg_attribute ON attrelid = tables.oid AND attnum > 0 AND NOT attisdropped
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        LEFT JOIN pg_collation ON pg_collation.oid = attcollation
    UNION ALL
    SELECT format('constraint %s of %s', conname, relname), pg_get_constraintdef(pg_constraint.oid)
    FROM tables JOIN pg_constraint ON conrelid = tables.oid AND contype <> 'n'
    UNION ALL
    SELECT format('index %s', indexname), indexdef FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL
    SELECT format('trigger %s of %s', tgname, relname), pg_get_triggerdef(pg_trigger.oid)
    FROM tables JOIN pg_trigger ON tgrelid = tables.oid AND NOT tgisinternal
    UNION ALL
    SELECT format('function %s(%s)', proname, pg_get_function_identity_arguments(oid)),
        format('%s %s %s', CASE WHEN prosecdef THEN 'SECURITY DEFINER' ELSE 'SECURITY INVOKER' END,
            proconfig, md5(regexp_replace(prosrc, '\\s+', ' ', 'g')))
    FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_proc.oid AND deptype = 'e')
    ORDER BY 1
"""


async def read_catalog(connection: Connection) -> list[str]:
    """Return the objects of the schema public as lines ``name: description``, sorted by name."""
    objects = await connection.fetch(CATALOG)
    # Whether PostgreSQL qualifies a name depends on the connection's search path.
    return [f"{name}: {description.replace('public.', '')}" for name, description in objects]


def first_difference(expected: Sequence[str], found: Sequence[str]) -> str | None:
    """Return the name of an expected object that is missing or differs; None if all are present and equal.

    Other objects are ignored: an operator may add an index or a table.
    """
    missing = sorted({*expected} - {*found})
    return missing[0].partition(": ")[0] if missing else None
