"""Write the catalog of a new database to the file that ``check`` compares databases with."""

import asyncio

from projections.postgres import Connection
from service.database.catalog import CATALOG_FILE, read_catalog, read_rights
from service.database.connections import connected
from service.database.embedded_postgres import EmbeddedPostgres
from service.database.schema import SERVICE_ROLE, prepare_database
from tests.support.folders import make_folder


async def describe(connection: Connection) -> str:
    """Return the objects of a database, and the rights of the service's role, one line each."""
    lines = [*await read_catalog(connection), *await read_rights(connection, SERVICE_ROLE)]
    return "".join(f"{line}\n" for line in lines)


async def describe_new(dsn: str) -> str:
    """Apply the schema to an empty database, and describe it."""
    await prepare_database(dsn)
    async with connected(dsn) as connection:
        return await describe(connection)


if __name__ == "__main__":
    with EmbeddedPostgres(make_folder()) as server:
        CATALOG_FILE.write_text(asyncio.run(describe_new(server.dsn)), encoding="utf-8")
