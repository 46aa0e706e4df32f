"""A trace of the model, replayed with real recorders on a real PostgreSQL."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Final

import pytest

from domain.order import Order, Report
from projections.postgres import Connection
from service.database.connections import DedicatedConnection, connect
from service.event_log import store
from service.event_log.store import Appended, SeenEvent
from service.ingest.recorder import Receipt, Recorder
from tests.model.explore import Exploration, states_of
from tests.model.invariants import Fact, violations
from tests.model.protocol import PROCESS_OF, Rules, State
from tests.support.databases import TestServer, wait_for_locked
from tests.support.recording import locked_log, logged_events, make_recorder
from tests.support.reports import report
from tests.support.waiting import PATIENCE_SECONDS

# Each report advances its order, whatever came before, so that an event's status tells which report it is of.
STATUSES: Final = ("Diajukan", "Dipacking", "Dijemput")
ADVANCED_TO: Final = ("submitted", "packed", "picked_up")
# The steps that take events from the log.
LOSSES: Final = ("restore", "fail over")


class Gate:
    """Where a process waits until the replay lets it go on."""

    def __init__(self) -> None:
        self.is_closed = False
        self._at = asyncio.Event()
        self._open = asyncio.Event()

    async def pass_through(self) -> None:
        """Wait if the gate is closed."""
        if self.is_closed:
            self._at.set()
            await self._open.wait()

    async def wait(self) -> None:
        """Close the gate, and wait until the process has reached it."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self._at.wait()

    def open(self) -> None:
        """Let the process go on, now and later."""
        self.is_closed = False
        self._open.set()

    def close(self) -> None:
        """Stop the process at the gate when it comes there."""
        self.is_closed = True
        self._at.clear()
        self._open.clear()


class Recording:
    """One process of the model: a recorder whose first append of each report waits at a gate.

    Args:
        dsn: the database.
        rules: what of the code is left out.
    """

    def __init__(self, dsn: str, rules: Rules) -> None:
        isolation = "read committed" if rules.searches_again else "repeatable read"
        opening = partial(connect, dsn, default_transaction_isolation=isolation)
        self.gate = Gate()
        self.task: asyncio.Task[Receipt] | None = None
        self.dedicated = DedicatedConnection(opening, on_open=self._forget)
        self.recorder = make_recorder(self.dedicated)

    def _forget(self) -> None:
        self.recorder.forget()

    def owns(self, connection: Connection) -> bool:
        """Return whether a connection is this process's."""
        return self.dedicated._connection is connection  # noqa: SLF001

    def begin(self, one: Report) -> None:
        """Let a report arrive."""
        self.gate.close()
        self.task = asyncio.create_task(self.recorder.record(one))

    async def end(self) -> None:
        """Wait until the report has been answered."""
        self.gate.open()
        if self.task is not None:
            await asyncio.wait_for(asyncio.shield(self.task), PATIENCE_SECONDS)

    def cut(self) -> None:
        """Close the connection, if there is one, on the client's side alone."""
        if (connection := self.dedicated._connection) is not None:  # noqa: SLF001
            connection._transport.abort()  # type: ignore[attr-defined]  # noqa: SLF001


def leave_out(rules: Rules, processes: Sequence[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put gates before the appends of real recorders, and take out what the rules leave out."""
    append, find_appended = store.append, store.find_appended
    searched: set[str] = set()

    async def append_at_gate(
        connection: Connection,
        events: Sequence[Order.StatusReported],
        seen: Sequence[SeenEvent] = (),
        *,
        notify: bool = True,
    ) -> Appended:
        if not connection.is_in_transaction():
            (process,) = (one for one in processes if one.owns(connection))
            await process.gate.pass_through()
        return await append(connection, events, seen if rules.proves else (), notify=notify)

    async def find_once(connection: Connection, events: Sequence[Order.StatusReported]) -> Appended | None:
        new = {event.report_id for event in events} - searched
        searched.update(new)
        return await find_appended(connection, events) if new else None

    monkeypatch.setattr(store, "append", append_at_gate)
    if not rules.searches_again:
        monkeypatch.setattr(store, "find_appended", find_once)
    if not rules.forgets:
        monkeypatch.setattr(Recorder, "forget", lambda _recorder: None)


class Replay:
    """Takes the steps of a trace with real recorders.

    Args:
        exploration: what the model found.
        server: the server.
        dsn: a database with an empty log.
        processes: the recorders, as ``leave_out`` has prepared them.
    """

    def __init__(
        self, exploration: Exploration, server: TestServer, dsn: str, processes: Sequence[Recording]
    ) -> None:
        self._trace = exploration.trace
        self._states = [State(), *states_of(exploration.trace, exploration.rules)]
        self._server = server
        self._dsn = dsn
        self._processes = processes
        self._reports: list[Report] = []
        # By the number of events that the log had.
        self._dumps: dict[int, bytes] = {}
        self._holder: Connection | None = None

    async def run(self) -> list[str]:
        """Take all steps, and return which invariants the real log breaks then."""
        # A loss of the trace begins with a dump of the log at its length then.
        kept = {int(count) for name, *rest in self._trace if name in LOSSES for count in rest}
        async with AsyncExitStack() as self._lock:
            for at, step in enumerate(self._trace):
                if (length := len(self._states[at].log)) in kept - {*self._dumps}:
                    self._dumps[length] = await asyncio.to_thread(self._server.dump, self._dsn)
                await self._take(at, *step)
        for process in self._processes:
            await process.end()
        return await self._broken()

    async def _take(self, at: int, name: str, *about: int | str) -> None:
        if name in LOSSES:
            await self._lose(name, int(about[0]))
        elif name == "execute orphan":
            await self._lock.aclose()
        elif name in {"arrive", "decide", "send", "cut", "execute", "confirm", "append"}:
            await self._work(at, name, self._processes[PROCESS_OF[int(about[0])]], *map(str, about[1:]))

    async def _work(self, at: int, name: str, process: Recording, order: str = "") -> None:
        if name == "arrive":
            self._reports.append(report(order, STATUSES[len(self._reports)]))
            process.begin(self._reports[-1])
        elif name == "decide":
            await process.gate.wait()
        elif name == "send" and self._is_cut_before_execution(at):
            self._holder = await self._lock.enter_async_context(locked_log(self._dsn))
            process.gate.open()
            await wait_for_locked(self._holder)
        elif name == "cut" and self._holder is not None:
            process.cut()
            # It has begun a transaction, behind the abandoned statement.
            await wait_for_locked(self._holder, 2)
        elif name == "execute":
            process.gate.open()
        elif name in {"confirm", "append"}:
            await process.end()

    def _is_cut_before_execution(self, at: int) -> bool:
        step, *_ = (name for name, *about in self._trace[at + 1 :] if about[:1] == [*self._trace[at][1:]])
        return step == "cut"

    async def _lose(self, name: str, kept: int) -> None:
        if name == "fail over":
            for process in self._processes:
                process.cut()
        await asyncio.to_thread(self._server.restore_clean, self._dsn, self._dumps[kept])

    async def _broken(self) -> list[str]:
        """Return which invariants the real log breaks, with the reports numbered as in the model."""
        numbers: dict[Any, int] = {one.arrival.report_id: number for number, one in enumerate(self._reports)}
        connection = await connect(self._dsn)
        events = [event for _, event in await logged_events(connection)]
        await connection.close()
        facts = [
            Fact(
                event.originator_id,
                event.originator_version,
                numbers[event.report_id],
                None if event.previous_status is None else ADVANCED_TO.index(event.previous_status),
                numbers[event.report_id],
            )
            for event in events
        ]
        acknowledged = {
            numbers[process.task.result()["report_id"]] for process in self._processes if process.task
        }
        return violations(facts, acknowledged, self._states[-1].lost)


async def replay(
    exploration: Exploration, server: TestServer, dsn: str, patch: pytest.MonkeyPatch, real: Rules
) -> list[str]:
    """Take the steps of a trace with real recorders; return which invariants the real log breaks then.

    Args:
        exploration: what the model found.
        server: the server.
        dsn: a database with an empty log.
        patch: takes out what the real recorders leave out.
        real: the rules that the real recorders keep.
    """
    processes = [Recording(dsn, real) for _ in {*PROCESS_OF}]
    leave_out(real, processes, patch)
    try:
        return await Replay(exploration, server, dsn, processes).run()
    finally:
        for process in processes:
            await process.dedicated.close()
