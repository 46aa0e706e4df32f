"""The service's own state over HTTP: its views, whether it is alive, and whether it is ready."""

from collections.abc import Iterable
from math import isinf
from typing import Final, NotRequired

from aiohttp import web
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from service.api.freshness import Projection, read_projection
from service.database.connections import ConnectionPool, DedicatedConnection, StorageUnavailableError
from service.database.replica import read_replica
from service.event_log import store
from service.http.endpoints import Endpoint, Tag
from service.http.parameters import Query
from service.http.problems import ProblemType, unavailable
from service.http.responses import json_response
from service.http.times import to_rfc3339
from service.ingest.refusals import PASSING, Refusals, find_cause
from service.projecting.position import ViewPosition
from service.version import build_info

READY_SECONDS_MAX: Final = 1.0


class ProjectionList(TypedDict):
    """The state of every view."""

    head: int
    projections: list[Projection]


class Life(TypedDict):
    """The process responds, and runs this version and commit; an unknown commit is "unknown"."""

    status: str
    version: str
    commit: str


class Health(TypedDict):
    """This process is ready. Only one that only reads has a role, ``reader``, and its database's age."""

    status: str
    role: NotRequired[str]
    age_seconds: NotRequired[float]


READY: Final[Health] = {"status": "ready"}


class HealthApi:
    """Serves the state of the service.

    Args:
        pool: the connections to read with.
        dedicated: the connection that checks the database, so that no slow read delays it.
        positions: how far each view has come.
        refusals: the webhooks that got 503.
        replica_age_seconds_max: how old the database of a process that only reads may be; None if it records.
    """

    tag = Tag("service", "Whether the service is alive and ready, and how far its views are behind the log.")

    def __init__(
        self,
        pool: ConnectionPool,
        dedicated: DedicatedConnection,
        positions: Iterable[ViewPosition],
        refusals: Refusals,
        *,
        replica_age_seconds_max: float | None = None,
    ) -> None:
        self._pool = pool
        self._dedicated = dedicated
        self._positions = positions
        self._refusals = refusals
        self._age_seconds_max = replica_age_seconds_max
        # Read at the start: the files may be replaced while the old code runs.
        self._life: Life = {"status": "alive", **build_info()}  # type: ignore[typeddict-item]

    @Endpoint("GET", "/projections", ProjectionList)
    async def get_projections(self, _request: web.Request, _query: Query) -> web.Response:
        """Get the position and lag of every view, and the orders parked in it."""
        async with self._pool.connection() as connection:
            views = [await read_projection(connection, position) for position in self._positions]
            head = await store.head_position(connection)
        return json_response({"head": head, "projections": views})

    @Endpoint("GET", "/livez", Life, scope=None)
    async def get_liveness(self, _request: web.Request, _query: Query) -> web.Response:
        """Check that the process responds. The database is not checked."""
        return json_response(self._life)

    @Endpoint("GET", "/readyz", Health, scope=None, problems=(ProblemType.UNAVAILABLE,))
    async def get_readiness(self, _request: web.Request, _query: Query) -> web.Response:
        """Check that the database responds in time, and that webhooks can be recorded.

        A process that only reads checks the age of its database and the definitions of its views instead.
        """
        try:
            async with self._dedicated.connection(READY_SECONDS_MAX) as connection:
                replica = await read_replica(connection)
        except StorageUnavailableError as error:
            raise unavailable("the database does not respond", cause=find_cause(error)) from error
        if self._age_seconds_max is not None:
            return json_response(self._reader_health(replica.age_seconds, self._age_seconds_max))
        if replica.is_standby:
            raise unavailable("the database is a standby, which cannot record webhooks", cause="read_only")
        # A full queue empties by itself, and faster if the load balancer sends nothing else.
        if (refusal := self._refusals.recent) is not None and refusal.cause not in PASSING:
            since = to_rfc3339(refusal.since, "seconds")
            raise unavailable(f"webhooks are refused since {since}: {refusal.cause}", cause=refusal.cause)
        return json_response(READY)

    def _reader_health(self, age_seconds: float, age_seconds_max: float) -> Health:
        """Return the health of a process that only reads.

        Raises:
            ProblemError: 503, the replica or a view cannot be used.
        """
        if isinf(age_seconds):
            detail = "the replica receives no WAL, and has replayed no commit since its start"
            raise unavailable(detail, cause="replica_behind")
        if age_seconds > age_seconds_max:
            missed = f"the commits of {age_seconds:.1f} s, more than {age_seconds_max:g} s"
            raise unavailable(
                f"the replica may have missed {missed}",
                cause="replica_behind",
                age_seconds=round(age_seconds, 3),
            )
        for position in self._positions:
            if position.is_outdated:
                detail = f"the view {position.view.name} has the definition of another release"
                raise unavailable(detail, cause="view_outdated", view=position.view.name)
        return {**READY, "role": "reader", "age_seconds": round(age_seconds, 3)}
