"""A streaming replica: whether the database is one, and how far it is behind its primary."""

from math import inf
from typing import Final, NamedTuple

from projections.postgres import Connection

# A replica that streams and has replayed everything that it received is current. Otherwise, its newest replayed
# commit bounds how old it is, which is null if it has replayed none since its start. After a start, the
# received position may be the beginning of a WAL file, below the replayed one. Every role may read all of this.
STATE: Final = """
    SELECT pg_is_in_recovery(),
        CASE WHEN NOT pg_is_in_recovery() THEN 0
             WHEN EXISTS (SELECT FROM pg_stat_wal_receiver)
                  AND pg_last_wal_receive_lsn() <= pg_last_wal_replay_lsn() THEN 0
             ELSE greatest(0, extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8)
        END
"""


class Replica(NamedTuple):
    """The state of a database that is read.

    Attributes:
        is_standby: whether it is a standby; otherwise it is a primary.
        age_seconds: for how many seconds it may have missed commits of its primary, by the clocks of both
            machines; infinite if that is unknown, 0.0 for a primary.
    """

    is_standby: bool
    age_seconds: float


async def read_replica(connection: Connection) -> Replica:
    """Return the state of the database."""
    ((is_standby, age_seconds),) = await connection.fetch(STATE)
    return Replica(is_standby, inf if age_seconds is None else age_seconds)
