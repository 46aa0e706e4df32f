"""The log's id, by which a reader recognises that a position belongs to another log.

A database gets its id with its schema. An export has the id, and so has every standby. A dump does not: after a
restore, the next start makes a new one, because the restored log may lack events that readers have seen.
"""

from typing import Final
from uuid import UUID

import structlog

from projections.postgres_errors import Connection
from service.database.connections import StorageUnavailableError

# A dump leaves out the rows of this table.
TABLE: Final = "log_identity"
LOG_ID: Final = "SELECT log_id FROM public.log_identity"
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
    """
    log_id: UUID | None = await connection.fetchval(LOG_ID)
    if log_id is None:
        raise StorageUnavailableError("the log has no id, as after a restore: run 'migrate' to make one")
    return log_id


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
        """
        log_id = str(await read_log_id(connection))
        before, self.log_id = self.log_id, log_id
        if before not in {"", self.log_id}:
            logger.warning("the database has another log", log_before=before, log_now=self.log_id)
