"""The composition root: the core, the features that are on, and the web application that serves them."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Final

import structlog
from aiohttp import web

from service.api.audit import AuditApi
from service.api.contradictions import ContradictionsApi
from service.api.freshness import add_freshness
from service.api.health import HealthApi
from service.api.metrics import Measure, Metrics
from service.api.openapi import OpenApi
from service.api.orders import OrdersApi
from service.api.quarantine import QuarantineApi
from service.api.statistics import StatisticsApi
from service.core import Core
from service.database.operations import record_feature, system_user
from service.features import FEATURES, SWITCHED, choose_features
from service.http.budgets import Budgets
from service.http.endpoints import Api, make_routes
from service.http.request_ids import TRACE_HEADER, caller_trace, route_pattern
from service.settings import CoreSettings

# The paths that are also served at ORDER_TRACKING_METRICS_PORT, since a shared port has one process respond.
MONITORING_PATHS: Final = frozenset({"/metrics", "/livez", "/readyz"})

logger = structlog.get_logger()


class Service:
    """The running parts of one process.

    Args:
        settings: the settings.
        dsn: the database's DSN, with the service's own role.
        owner_dsn: the configured DSN, whose role may erase; None for the same.
        budgets: the budgets of the process; None for new ones.
    """

    def __init__(
        self,
        settings: CoreSettings,
        dsn: str,
        owner_dsn: str | None = None,
        budgets: Budgets | None = None,
    ) -> None:
        self.core = Core(settings, dsn, owner_dsn, budgets or Budgets())
        self.apis: list[Api] = []
        self._settings = settings
        self._features = AsyncExitStack()

    async def start(self) -> None:
        """Open the core, enter the features that are on, and begin to follow the log."""
        await self.core.open()
        await self.enter(await self._choose_features())
        await self.core.start()

    async def enter(self, names: Sequence[str]) -> None:
        """Enter features, and make the APIs of the service. This needs no database.

        Args:
            names: the names of the features, in the order of the registry.
        """
        core = self.core
        features = [SWITCHED[name] for name in names]
        for feature in features:
            run = feature.load("run")
            core.contributions[feature.name] = await self._features.enter_async_context(run(core))
        self.apis = self._make_apis()
        outgoing = [one for contribution in core.contributions.values() for one in contribution.outgoing]
        problems = [problem for feature in features for problem in feature.load("problems") or ()]
        self.openapi = OpenApi(self.apis, outgoing, problems)
        self.apis.append(self.openapi)

    async def _choose_features(self) -> Sequence[str]:
        """Return the names of the features that are on, and note what the database has of the others."""
        async with self.core.pool.connection() as connection:
            chosen = await choose_features(self._settings, connection)
            if self.core.is_reader:
                return chosen.on
            for feature in FEATURES:
                use = chosen.used_but_off.get(feature.name)
                if use is not None:
                    logger.warning(
                        "a feature is off that the database has used",
                        feature=feature.name,
                        database=use,
                        meanwhile=feature.while_off,
                    )
                if feature.use:
                    await record_feature(connection, system_user()._replace(via="service"), feature.name, use)
        return chosen.on

    def _make_apis(self) -> list[Api]:
        core, settings = self.core, self._settings
        return [
            OrdersApi(core.pool, core.make_hot, core.positions, core.budgets, core.identity),
            StatisticsApi(core.pool, core.positions, core.vocabulary.recognise, settings.zone),
            core.events,
            AuditApi(core.pool, core.positions, core.vocabulary),
            ContradictionsApi(core.pool, core.positions),
            QuarantineApi(core.pool, core.recorder),
            *(api for contribution in core.contributions.values() for api in contribution.apis),
            HealthApi(
                core.pool,
                core.auth_connection,
                [*core.positions.values()],
                core.refusals,
                replica_age_seconds_max=settings.replica_age_seconds_max if core.is_reader else None,
            ),
            self._make_metrics(),
        ]

    def _make_metrics(self) -> Metrics:
        core = self.core
        measures: list[Measure] = [core.http_metrics.collect, core.ingest_metrics.collect, core.measure]
        if core.retention is not None:
            measures.append(core.retention.collect)
        reads = [one.read_metrics for one in core.contributions.values() if one.read_metrics is not None]
        return Metrics(core.pool, [*core.positions.values()], measures, reads)

    async def stop(self) -> None:
        """Answer the waiting reports, then stop everything."""
        await self.core.recorder.drain()
        await self.core.background.stop()
        await self._features.aclose()
        await self.core.close()

    def make_app(self, body_bytes_max: int) -> web.Application:
        """Return the HTTP application of a started service.

        Args:
            body_bytes_max: the size limit of request bodies.
        """
        core = self.core
        app = web.Application(client_max_size=body_bytes_max)
        if core.is_reader:
            app.on_response_prepare.append(add_freshness)
        app.add_routes(core.webhook.routes())
        for contribution in core.contributions.values():
            contribution.prepare(app)
        for api in self.apis:
            app.add_routes(make_routes(api, core.access, core.identity))
        return app

    def make_monitoring_app(self, body_bytes_max: int) -> web.Application:
        """Return the HTTP application with the state of this one process, for its own address."""
        app = web.Application(client_max_size=body_bytes_max)
        make = partial(make_routes, access=self.core.access, log=self.core.identity)
        routes = (route for api in self.apis for route in make(api))
        app.add_routes(route for route in routes if route.path in MONITORING_PATHS)
        return app

    def on_response(self, request: web.BaseRequest, status: int, seconds: float) -> None:
        """Measure a response, and log it if requests are logged."""
        self.core.http_metrics.measure_response(request, status, seconds)
        if self._settings.log_requests:
            route, milliseconds = route_pattern(request), round(seconds * 1_000, 1)
            trace = caller_trace(request)
            more = {} if trace is None else {TRACE_HEADER: trace}
            logger.info("request", method=request.method, route=route, status=status, ms=milliseconds, **more)
