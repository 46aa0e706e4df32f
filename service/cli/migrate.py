from service.console import database, show
from service.database.connections import connected
from service.database.schema import SCHEMA_VERSION, apply_schema
from service.features.settings import read_settings


async def migrate() -> None:
    async with (
        database(read_settings(), as_service=False, may_create=True) as dsn,
        connected(dsn) as connection,
    ):
        await apply_schema(connection)
    show(f"the schema has version {SCHEMA_VERSION}")
