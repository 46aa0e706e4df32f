"""The log's id, by which a reader recognises that a position belongs to another log.

A database gets its id with its schema. A log that is moved keeps it, and every standby has it. A dump has none:
after a restore, the next start makes one, because the restored log may lack events that readers have seen.
"""

from typing import Final
from uuid import UUID

import structlog

from projections.postgres import Connection
from service.database.connections import StorageUnavailableError, UnsupportedServerError

# A dump leaves out the rows of this table.
TABLE: Final = "log_identity"
LOG_ID: Final = "SELECT log_id FROM public.log_identity"
IDENTITY: Final = "SELECT log_id, moved_to FROM public.log_identity"
MOVED_TO: Final = "SELECT moved_to FROM public.log_identity"
MARK_MOVED: Final = "UPDATE public.log_identity SET moved_to = $1"
MAKE_LOG_ID: Final = "INSERT INTO public.log_identity DEFAULT VALUES ON CONFLICT DO NOTHING"
SET_LOG_ID: Final = """
    INSERT INTO public.log_identity (log_id) VALUES ($1)
    ON CONFLICT (one_row) DO UPDATE SET log_id = excluded.log_id
"""

logger = structlog.get_logger()


async def read_log_id(connection: Connection) -> UUID:
    """Return the log's id.

    Raises:
        StorageUnavailableError: the log has none, as after a restore.
        UnsupportedServerError: the log was moved to another database.
    """
    row = await connection.fetchrow(IDENTITY)
    if row is None:
        raise StorageUnavailableError("the log has no id, as after a restore: run 'migrate' to make one")
    log_id: UUID = row["log_id"]
    if row["moved_to"] is not None:
        raise UnsupportedServerError(moved(row["moved_to"]))
    return log_id


def moved(destination: str) -> str:
    """Return what to do with a database whose log was moved."""
    setting = "STATE_DIR" if destination.startswith("/") else "DATABASE_URL"
    return f"the log was moved to {destination}: set ORDER_TRACKING_{setting} to that database"


async def mark_moved(connection: Connection, destination: str) -> None:
    """Mark the log as moved. The connection's role must own the log."""
    await connection.execute(MARK_MOVED, destination)


async def set_log_id(connection: Connection, log_id: UUID) -> None:
    """Give the log the id that it had in another database. The connection's role must own the log."""
    await connection.execute(SET_LOG_ID, log_id)


class LogIdentity:
    """The id of the log that the service is connected to.

    Every connection that positions come from reads the id when it is opened: a database can be replaced under a
    running service, such as by a restore.

    Attributes:
        log_id: the id, empty before the first connection.
    """

    def __init__(self) -> None:
        self.log_id = ""

    async def read(self, connection: Connection) -> None:
        """Read the id on a new connection.

        Raises:
            StorageUnavailableError: the log has none, as after a restore.
            UnsupportedServerError: the log was moved to another database.
        """
        log_id = str(await read_log_id(connection))
        before, self.log_id = self.log_id, log_id
        if before not in {"", self.log_id}:
            logger.warning("the database has another log", log_before=before, log_now=self.log_id)
