"""Mutants: services with one deliberate fault each, which the harness must find to prove that it works.

Run as a program with a mutant's name and a command, this module is that service. It is the only place that
replaces code of the service, because it tests the harness.
"""

import asyncio
import sys
from collections.abc import Callable, Sequence
from math import inf
from types import SimpleNamespace
from typing import Any, Final, cast
from uuid import UUID

from domain.order import Order, Report
from projections.postgres import Connection
from projections.views import VIEWS
from service.api import events
from service.batcher import Batcher
from service.cli.main import cli
from service.core import Core
from service.database import connections
from service.event_log import store
from service.features.proofs import storage
from service.features.proofs.signer import Signer
from service.features.proofs.storage import Tree
from service.features.subscriptions.delivery import Delivery
from service.features.subscriptions.holding import Holding
from service.features.subscriptions.progress import Progress
from service.http import connections as http_connections
from service.http import streaming
from service.ingest.recorder import Receipt, Recorder, _receipt
from service.ingest.refusals import Refusals

COMMITTED_AFTER_SECONDS: Final = 0.5
HELD_BYTES: Final = 512 * 1024
# A position beyond every log.
FAR: Final = 2**62


class EarlyRecorder:
    """Acknowledges reports at once, with their future positions, and commits them a moment later."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._position: int | None = None
        self._commits: set[asyncio.Task[None]] = set()

    async def record(self, recorder: Recorder, reports: list[Report]) -> list[Receipt]:
        """Replace ``Recorder._record_together``."""
        order_nos = {report.order_no for report in reports}
        events = recorder._decide_all(reports, (await recorder._known_states(order_nos, [inf]))[0])  # noqa: SLF001
        if self._position is None:
            async with recorder._locked(inf) as connection:  # noqa: SLF001
                self._position = await store.head_position(connection)
        first = self._position + 1
        self._position += len(events)
        recorder._states.learn(events)  # noqa: SLF001
        task = asyncio.create_task(self._commit(recorder, events))
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)
        return [_receipt(event, position) for position, event in enumerate(events, first)]

    async def _commit(self, recorder: Recorder, events: Sequence[Order.StatusReported]) -> None:
        await asyncio.sleep(COMMITTED_AFTER_SECONDS)
        # The lock is fair, so the commits follow the order of the acknowledgements.
        async with self._turn, recorder._locked(inf) as connection:  # noqa: SLF001
            await store.append(connection, events)


def _replace(owner: object, name: str, code: object) -> None:
    assert hasattr(owner, name)
    setattr(owner, name, code)


def acknowledge_early() -> None:
    """Acknowledge reports before they are committed."""
    early = EarlyRecorder()

    async def record(recorder: Recorder, reports: list[Report], _dues: object) -> Sequence[Receipt]:
        return await early.record(recorder, reports)

    _replace(Recorder, "_record_together", record)


def keep_memory() -> None:
    """Keep the order states and the log's tail when a connection is opened again; prove nothing."""
    append = store.append

    async def append_unproved(
        connection: Connection,
        events: Sequence[Order.StatusReported],
        _seen: object = (),
        *,
        notify: bool = True,
    ) -> store.Appended:
        return await append(connection, events, notify=notify)

    _replace(Core, "forget", lambda _core: None)
    _replace(store, "append", append_unproved)


def retry_blindly() -> None:
    """Record again after a lost connection, without a search for the events that may be committed."""

    async def find_nothing(_connection: Connection, _events: Sequence[Order.StatusReported]) -> None:
        return None

    _replace(store, "find_appended", find_nothing)


def use_defaults() -> None:
    """Leave isolation, read-only mode and timeouts to the database's defaults."""
    for name in [*connections.SERVER_SETTINGS]:
        if name.startswith("default_transaction") or name.endswith("_timeout"):
            del connections.SERVER_SETTINGS[name]


def use_first_time_limit() -> None:
    """Give every report in a batch the time limit of the first one."""
    work_on = Batcher._work_on  # noqa: SLF001

    async def work_on_in_time(batcher: Batcher[Any, Any], batch: list[Any]) -> None:
        work, (_, _, first_due, _) = batcher._work, batch[0]  # noqa: SLF001
        batcher._work = lambda items, _dues: work(items, [first_due] * len(items))  # noqa: SLF001
        try:
            await work_on(batcher, batch)
        finally:
            batcher._work = work  # noqa: SLF001

    _replace(Batcher, "_work_on", work_on_in_time)


def trust_connections() -> None:
    """Use idle connections without a probe."""

    async def trust(_connection: Connection) -> None:
        pass

    _replace(connections, "_terminate_if_silent", trust)


def require_notifications() -> None:
    """Append no event without its notification."""
    _replace(store, "APPEND_SILENTLY", store.APPEND)


def stay_silent() -> None:
    """Neither count nor log refused webhooks."""

    async def ignore(_refusals: Refusals, _error: Exception, _path: str) -> str:
        return "no_answer"

    _replace(Refusals, "count", ignore)


def hold_much() -> None:
    """Keep a large slice in memory for each reader of a stream."""
    for module in (http_connections, streaming):
        _replace(module, "SLICE_BYTES_MAX", HELD_BYTES)


def believe_positions() -> None:
    """Take every position of a reader to be within the log."""

    async def far(_connection: Connection) -> int:
        return FAR

    _replace(events, "store", SimpleNamespace(**{**vars(store), "head_position": far}))


def forget_held() -> None:
    """Save how far a subscription is, but not which orders it holds."""
    save = Progress.save

    async def save_without_held(progress: Progress, *arguments: Any) -> Any:
        return await cast("Any", save)(progress, *arguments[:-1], arguments[-1]._replace(held={}))

    _replace(Progress, "save", save_without_held)


def pass_held() -> None:
    """Deliver later events of an order while an earlier one is held."""
    admit = Delivery._admit  # noqa: SLF001

    def admit_all(delivery: Delivery, work: Any, position: int, event: Any) -> None:
        held, work.held = work.held, Holding({}, (), frozenset(), lambda: None)
        admit(delivery, work, position, event)
        work.held = held

    _replace(Delivery, "_admit", admit_all)


def forget_delivered() -> None:
    """Forget what was read for a subscription, and pause none when the log has lost events."""

    async def pause_none(_progress: Progress) -> list[UUID]:
        return []

    _replace(Delivery, "reached", None)
    _replace(Progress, "pause_all", pause_none)


def sign_anything() -> None:
    """Sign the history whatever the guard has."""

    async def trust(
        _: Signer, connection: Connection, tree: Tree, _keys: object, _guard: object, *sizes: int
    ) -> list[bytes]:
        return await storage.read_roots(connection, tree.number, *sizes)

    _replace(Signer, "_read_roots", trust)


def fold_otherwise() -> None:
    """Be another release, whose timeline has another definition: a valid state, not a fault."""
    view = next(view for view in VIEWS if view.name == "timeline")
    object.__setattr__(view, "fold_version", view.fold_version + 1)


MUTANTS: Final[dict[str, Callable[[], None]]] = {
    mutant.__name__.replace("_", "-"): mutant
    for mutant in (
        acknowledge_early,
        keep_memory,
        retry_blindly,
        use_defaults,
        use_first_time_limit,
        trust_connections,
        require_notifications,
        stay_silent,
        believe_positions,
        hold_much,
        forget_held,
        pass_held,
        forget_delivered,
        sign_anything,
        fold_otherwise,
    )
}


def command(mutant: Callable[[], None]) -> tuple[str, ...]:
    """Return the command that starts a mutant."""
    return sys.executable, "-m", __name__, mutant.__name__.replace("_", "-")


if __name__ == "__main__":
    MUTANTS[sys.argv.pop(1)]()
    cli()
