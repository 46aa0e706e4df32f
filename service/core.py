"""The core of a running service: what records reports and reads the log, and what every feature builds on."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import structlog
from prometheus_client.core import CounterMetricFamily, Metric

from domain.order import Order
from projections.postgres import Connection
from service.api.events import EventsApi
from service.api.freshness import wait_for
from service.background import BackgroundTasks, listen
from service.database.connections import (
    HOT_SETTINGS,
    POOL_SETTINGS,
    ConnectionPool,
    DedicatedConnection,
    connect,
    end_abandoned,
)
from service.database.durability import read_durability
from service.database.log_identity import LogIdentity
from service.dsn import as_reader
from service.event_log import times
from service.event_log.follow import Followers, Log, Memory, follow, rest_unless_full
from service.event_log.store import CHANNEL, last_arrival
from service.http.access import Access
from service.http.auth_refusals import AuthRefusals
from service.http.budgets import Budgets
from service.http.metrics import HttpMetrics
from service.http.problems import LogLimit
from service.ingest.hourly_bytes import HourlyBytes
from service.ingest.metrics import IngestMetrics
from service.ingest.quarantine import Quarantine
from service.ingest.recorder import Recorder
from service.ingest.refusals import Refusals
from service.ingest.signatures import make_scheme
from service.ingest.webhook import RefusedWebhook, Webhook
from service.ingest.webhook_auth import WebhookAuth
from service.maintenance.retention import PASS_SECONDS, Retention
from service.projecting.running import RunningViews
from service.settings import CoreSettings

if TYPE_CHECKING:
    from service.feature import Contribution

AnySettings = TypeVar("AnySettings", bound=CoreSettings)

logger = structlog.get_logger()


def _ignore() -> None:
    """Do nothing."""


class Core:
    """The parts of one process that record reports and read the log.

    Args:
        settings: the settings.
        dsn: the database's DSN, with the service's own role.
        owner_dsn: the configured DSN, whose role may erase; None for the same.
        budgets: the budgets of the process.

    Attributes:
        memory: the last events that this process has committed.
        log: the log.
        identity: the log's id.
        positions: how far each view has come.
        followers: what follows the log.
        contributions: what the features that are on contribute, by their names. Later features find those of
            earlier ones.
        failures: how often what a feature does after a commit has failed, by its name.
    """

    def __init__(self, settings: CoreSettings, dsn: str, owner_dsn: str | None, budgets: Budgets) -> None:
        seconds_max = settings.request_seconds_max
        self.settings = settings
        self.is_reader = settings.read_only
        # Whatever this process runs, PostgreSQL refuses its writes.
        self._dsn = as_reader(dsn) if self.is_reader else dsn
        self._dedicated: list[DedicatedConnection] = []
        self.contributions: dict[str, Contribution] = {}
        self.failures: Counter[str] = Counter()
        self._failure_lines = LogLimit()
        self.vocabulary = settings.vocabulary
        self.budgets = budgets
        self.identity = LogIdentity()
        self.pool = ConnectionPool(self._dsn, seconds_max, self.identity.read)
        self.log_connection = self.make_hot()
        self.append_connection = self._keep(
            DedicatedConnection(
                partial(
                    connect,
                    self._dsn,
                    partial(self._prepare_append, seconds_max=seconds_max),
                    **HOT_SETTINGS,
                    idle_in_transaction_session_timeout="5s",
                ),
                on_open=self.forget,
            )
        )
        # Slow reads may use the whole pool. Quarantining a body and checking an API key must not wait for them.
        connect_timely = partial(connect, self._dsn, **POOL_SETTINGS)
        self.quarantine_connection = self._keep(DedicatedConnection(connect_timely, seconds_max))
        self.auth_connection = self._keep(DedicatedConnection(connect_timely, seconds_max))
        self.memory = Memory(self.log_connection)
        self.log = Log(self.log_connection, self.memory)
        self.views = RunningViews(
            self._dsn,
            partial(self.make_hot, self.forget),
            self.log,
            is_reader=self.is_reader,
            # A standby sends no notifications. A view that has moved shows that the log has grown.
            on_move=self._wake_tail,
        )
        self.positions = self.views.positions
        self.auth_refusals = AuthRefusals(settings.trusted_proxies)
        self.access = Access(
            self.auth_connection,
            seconds_max,
            self.auth_refusals,
            is_open=settings.is_open,
            is_reader=self.is_reader,
        )
        self.http_metrics = HttpMetrics(self.auth_refusals, budgets)
        self._make_ingest(settings, seconds_max)
        self.events = EventsApi(
            *(self.pool, self.memory, self.access, budgets.streams, self.positions, self.identity)
        )
        self.tail = self.events.tail
        self.followers = Followers(self._note_failure)
        self.followers.join("live streams", self.tail.wake.set)
        for name, position in self.positions.items():
            self.followers.join(name, position.wake.set)
        self.retention: Retention | None = None
        if settings.body_retention_days:
            self.retention = Retention(self.pool, owner_dsn or dsn, self._dsn, settings.body_retention_days)
        self.background = BackgroundTasks()

    def _make_ingest(self, settings: CoreSettings, seconds_max: float) -> None:
        quarantine = Quarantine(self.quarantine_connection, settings.quarantine_hourly_max)
        volume = HourlyBytes(settings.webhook_bytes_hourly_max)
        self.refusals = Refusals(self.auth_connection, lambda keyed: self.recorder.trouble(keyed=keyed))
        self.ingest_metrics = IngestMetrics(quarantine, volume, self.refusals, lambda: self.recorder)
        self.recorder = Recorder(
            self.append_connection,
            self._on_commit,
            on_loss=self.forget,
            queue_reports_max=settings.queue_reports_max,
            seconds_max=seconds_max,
            recognise=self.vocabulary.recognise,
            on_batch=self.ingest_metrics.measure_batch,
        )
        self.webhook_auth = make_webhook_auth(settings, self.auth_refusals)
        self.webhook = (
            RefusedWebhook(self.webhook_auth, self.refusals)
            if self.is_reader
            else Webhook(self.webhook_auth, self.recorder, quarantine, volume, self.refusals, log=self.identity)
        )

    def settings_as(self, model: type[AnySettings]) -> AnySettings:
        """Return the settings as those of a feature."""
        if not isinstance(self.settings, model):
            raise TypeError(f"the settings lack those of {model.__name__}")
        return self.settings

    def _keep(self, dedicated: DedicatedConnection) -> DedicatedConnection:
        self._dedicated.append(dedicated)
        return dedicated

    def make_hot(self, on_open: Callable[[], None] = _ignore, **settings: str) -> DedicatedConnection:
        """Return a connection for frequent short statements, with some of PostgreSQL's settings.

        It is closed with the core.
        """
        connect_hot = partial(connect, self._dsn, self.identity.read, **HOT_SETTINGS, **settings)
        return self._keep(DedicatedConnection(connect_hot, on_open=on_open))

    async def _prepare_append(self, connection: Connection, *, seconds_max: float) -> None:
        await self.identity.read(connection)
        await end_abandoned(connection, seconds_max)

    async def open(self) -> None:
        """Open the pool, and learn of the last report."""
        await self.pool.open()
        if self.is_reader:
            return
        async with self.pool.connection() as connection:
            self.ingest_metrics.start_from(await last_arrival(connection))
            for setting, is_safe in (await read_durability(connection)).items():
                if not is_safe:
                    logger.warning("a crash of the server can lose acknowledged reports", setting=setting)

    async def start(self) -> None:
        """Begin to follow the log."""
        await self.views.start(self.background)
        if self.is_reader:
            return
        if self.retention is not None:
            self.background.start("erase old bodies", self.retention.run, restart_pause_seconds=PASS_SECONDS)
        for name, contribution in self.contributions.items():
            if contribution.wake is not None:
                self.followers.join(name, contribution.wake)
            for task in contribution.tasks:
                self.background.start(*task)
        sum_up = partial(
            follow,
            # This connection is open anyway, and mostly at rest.
            partial(times.add_blocks, self.quarantine_connection),
            # Nothing wakes it: a block takes a while to fill.
            asyncio.Event(),
            poll_seconds=times.POLL_SECONDS,
            rest=rest_unless_full(2, times.PAUSE_SECONDS),
        )
        self.background.start("sum up times", sum_up)
        self.background.start(
            "listen", partial(listen, partial(connect, self._dsn), CHANNEL, self.followers.wake)
        )

    async def close(self) -> None:
        """Close every connection."""
        for dedicated in self._dedicated:
            await dedicated.close()
        self.pool.close()

    async def wait_for_view(self, name: str, position: int | None) -> None:
        """Wait until a view has reached a position.

        Raises:
            ProblemError: 503, it did not in time; 410, the log ends before the position.
        """
        await wait_for(self.positions, position, name)

    def forget(self) -> None:
        """Believe nothing that was read from the log before, because commits may have been lost."""
        self.recorder.forget()
        self.memory.forget()
        self.views.forget()

    def _on_commit(self, events: Sequence[Order.StatusReported], positions: Sequence[int]) -> None:
        for name, contribution in self.contributions.items():
            try:
                contribution.on_commit(events, positions)
            except Exception as error:  # noqa: BLE001 - logged; the reports are committed
                self._note_failure(name, error)
        self.memory.remember(events, positions)
        self.ingest_metrics.count_commit(events, positions)
        self.followers.wake()

    def _note_failure(self, name: str, error: Exception) -> None:
        """Count the failure of a feature, and log it at most once a minute."""
        self.failures[name] += 1
        if (suppressed := self._failure_lines.admit(name)) is not None:
            logger.error("a feature failed after a commit", feature=name, suppressed=suppressed, exc_info=error)

    def _wake_tail(self) -> None:
        self.tail.wake.set()

    def measure(self) -> list[Metric]:
        """Return the metrics of the features that are on."""
        failures = CounterMetricFamily(
            "feature_failures", "Failures of a feature after a commit.", labels=["feature"]
        )
        for name in self.contributions:
            failures.add_metric([name], self.failures[name])
        return [failures, *(one for it in self.contributions.values() for one in it.measure())]


def make_webhook_auth(settings: CoreSettings, refusals: AuthRefusals) -> WebhookAuth:
    """Return the authentication of the webhook's sender."""
    return WebhookAuth(
        settings.tokens,
        make_scheme(settings.webhook_hmac_secret.get_secret_value(), settings.webhook_hmac_header),
        settings.trusted_proxies,
        refusals,
        is_open=settings.is_open,
    )
