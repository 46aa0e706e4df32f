"""Whether an acknowledged report survives a crash of the server, by the settings of a connection."""

from typing import Final

from projections.postgres import Connection

SETTINGS: Final = """
    SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit')
"""
# The values of synchronous_commit that wait for the local disk, among other things.
DURABLE: Final = frozenset({"on", "local", "remote_write", "remote_apply"})


async def read_durability(connection: Connection) -> dict[str, bool]:
    """Return the settings that decide on durability, as "name is value", and whether each is safe."""
    rows = await connection.fetch(SETTINGS)
    return {f"{name} is {setting}": setting in DURABLE for name, setting in rows}
