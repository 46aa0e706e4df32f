"""A view's tables are declared twice, as columns and in schema.sql: both have the same columns and keys."""

import pytest

from projections.postgres import Connection
from projections.statistics import count_by_status
from projections.view import View
from projections.views import VIEWS
from service.database.schema import prepare_database
from service.features.settings import Settings
from tests.support.recording import record, running
from tests.support.reports import report

# The columns of each table of a schema as SQL types, and those of its primary key in the key's order.
TABLES = """
    SELECT relname,
        array_agg(attname || ' ' || format_type(atttypid, atttypmod) ORDER BY attnum) AS columns,
        (SELECT array_agg(column_name::text ORDER BY ordinal_position)
         FROM information_schema.key_column_usage
         WHERE table_schema = $1 AND table_name = relname) AS key
    FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
    WHERE relnamespace = $1::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped
    GROUP BY relname
"""
TYPES_IN_FULL = {"timestamptz": "timestamp with time zone"}
IN_EVERY_VIEW = {"projection", "parked_orders"}


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
async def test_a_views_columns_are_those_of_schema_sql(connection: Connection, view: View) -> None:
    """Each table has the declared columns, with their types and in their order, and the declared key."""
    tables = {row["relname"]: row for row in await connection.fetch(TABLES, view.name)}
    assert tables.keys() == IN_EVERY_VIEW | {table.name for table in view.tables}
    for table in view.tables:
        declared = [f"{name} {TYPES_IN_FULL.get(type_, type_)}" for name, type_, _ in table.columns]
        assert tables[table.name]["columns"] == declared
        if table.key:
            assert tables[table.name]["key"] == list(table.key)


async def test_a_start_adds_the_schema_of_a_new_view(owner_dsn: str, dsn: str, connection: Connection) -> None:
    """A database of a release without a view gets the view without a migration."""
    async with running(Settings(), dsn) as service:
        await record(service, report("KOM1", "Dikirim"))
    await connection.execute("DROP SCHEMA statistics CASCADE")
    await connection.execute("DELETE FROM view_names WHERE view_name = 'statistics'")
    await prepare_database(owner_dsn)
    async with running(Settings(), dsn) as service:
        await record(service, report("KOM2", "Dikirim"))
        assert await count_by_status(connection) == {"in_transit": 2}
