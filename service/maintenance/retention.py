"""Retention: bodies of settled orders are erased when their last report is old enough."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from time import time
from typing import Final

import asyncpg
import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from domain.statuses import SETTLED
from projections.postgres import Connection
from service.database.connections import ConnectionPool, connected
from service.database.operations import Actor
from service.event_log import store
from service.event_log.codec import UndecodableEventError
from service.maintenance.erasure import erase_order, settle

# The pause between two passes over the orders.
PASS_SECONDS: Final = 3_600.0
BATCH_ORDERS_MAX: Final = 500
# The pause after each erasure, so that webhooks are not delayed.
ORDER_PAUSE_SECONDS: Final = 0.005
ACTOR: Final = Actor("service", "retention")

# Settled orders by their last report, beginning after an order, that were not erased since.
CANDIDATES: Final = """
    SELECT order_no, last_reported_at FROM current_status.orders AS settled
    WHERE (last_reported_at, order_no) > ($1, $2) AND last_reported_at < $3 AND status = ANY($4::text[])
      AND NOT EXISTS (
          SELECT FROM erasures WHERE erasures.order_no = settled.order_no AND erased_at > last_reported_at)
    ORDER BY last_reported_at, order_no LIMIT $5
"""
# Until then, the old versions of the rows keep their salts, with which a guess at a body could be confirmed.
VACUUM_SALTS: Final = "VACUUM (SKIP_LOCKED) history_salts"
MAY_ERASE: Final = """
    SELECT pg_has_role(relowner, 'MEMBER') FROM pg_class WHERE oid = 'public.order_events'::regclass
"""

logger = structlog.get_logger()


class Retention:
    """Erases the bodies of settled orders.

    Args:
        pool: the connections to find orders with.
        dsn: the database, for a role that may act as the log's owner.
        service_dsn: the database, for the service's own role.
        days: how long a body is kept after an order's last report.
    """

    def __init__(self, pool: ConnectionPool, dsn: str, service_dsn: str, days: int) -> None:
        self._pool = pool
        self._dsn = dsn
        self._service_dsn = service_dsn
        self._kept = timedelta(days=days)
        self.reason = f"ORDER_TRACKING_BODY_RETENTION_DAYS is {days}"
        self.erased_orders = 0
        self.last_pass_at = 0.0
        # Orders up to here need no second look: a later report of one of them comes after it.
        self._after: tuple[datetime, str] = (datetime.min.replace(tzinfo=UTC), "")

    def collect(self) -> Iterator[Metric]:
        """Yield its metrics."""
        yield CounterMetricFamily(
            "retention_erased_orders", "Orders whose bodies were erased by age.", self.erased_orders
        )
        yield GaugeMetricFamily(
            "retention_last_pass_timestamp_seconds",
            "End of the last pass over the orders; 0 if none has ended.",
            self.last_pass_at,
        )

    async def run(self) -> None:
        """Until cancelled, erase what is due, and wait."""
        while True:
            await self.erase_due(datetime.now(UTC))
            await asyncio.sleep(PASS_SECONDS)

    async def erase_due(self, now: datetime) -> int:
        """Erase every settled order whose last report is old enough, and return the number of orders.

        Raises:
            PermissionError: the role may not act as the log's owner.
            StorageUnavailableError: the database cannot be reached; the next pass goes on.
        """
        erased = 0
        async with connected(self._dsn) as owner, connected(self._service_dsn) as service:
            if not await owner.fetchval(MAY_ERASE):
                raise PermissionError(
                    "ORDER_TRACKING_BODY_RETENTION_DAYS is set, but the configured role may not erase: "
                    "run GRANT order_tracking_owner TO that role"
                )
            while candidates := await self._candidates(now - self._kept):
                done = []
                for order_no, last_reported_at in candidates:
                    try:
                        if await self._erase(owner, order_no, now - self._kept):
                            done.append(order_no)
                    except (UndecodableEventError, asyncpg.DataError) as error:
                        # One order must not keep the others' bodies. A traceback could quote the event.
                        reason = str(error)
                        logger.error("an order could not be erased", order_no=order_no, error=reason)  # noqa: TRY400
                    self._after = (last_reported_at, order_no)
                erased += len(done)
                if done and (late := await settle(owner, service, done)):
                    logger.warning("views still have erased words; they follow by themselves", views=late)
            if erased:
                await owner.execute(VACUUM_SALTS)
        self.last_pass_at = time()
        if erased:
            logger.info("bodies of settled orders were erased", orders=erased)
        return erased

    async def _candidates(self, before: datetime) -> list[tuple[str, datetime]]:
        async with self._pool.connection() as connection:
            rows = await connection.fetch(CANDIDATES, *self._after, before, [*SETTLED], BATCH_ORDERS_MAX)
        return [(order_no, last_reported_at) for order_no, last_reported_at in rows]

    async def _erase(self, owner: Connection, order_no: str, before: datetime) -> bool:
        """Erase an order if the log, which the service's role cannot change, confirms that it is due."""
        state = (await store.order_states(owner, [order_no]))[order_no]
        if state.status not in SETTLED or state.received_at >= before:
            return False
        await erase_order(owner, order_no, self.reason, ACTOR, state.version, before)
        self.erased_orders += 1
        await asyncio.sleep(ORDER_PAUSE_SECONDS)
        return True
