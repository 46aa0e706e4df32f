"""The first schema, that of commit a2c7c32, with filled tables: baseline.sql, as pg_dump wrote it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from projections.postgres import Connection
from service.database.connections import connect

BASELINE: Final = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
# The reader's role has no purpose any more, but it may still exist on a server.
ROLES: Final = """
    DO $$ BEGIN CREATE ROLE order_tracking_owner; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
    DO $$ BEGIN CREATE ROLE order_tracking_service LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
    DO $$ BEGIN CREATE ROLE order_tracking_reader; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
"""


@asynccontextmanager
async def baseline(dsn: str, sql: str = BASELINE) -> AsyncIterator[Connection]:
    """Connect to an empty database after creating the baseline schema in it."""
    connection = await connect(dsn)
    try:
        await connection.execute(ROLES)
        await connection.execute(sql)
        await connection.execute("SET search_path = public")
        yield connection
    finally:
        await connection.close()
