"""The protocol of recording as a small model: states, and the steps that lead from one to the next.

Two processes append to one log. Each step is one that nothing can interrupt: what PostgreSQL does in one
statement, or what a process does between two awaits. Anything else may happen in between: a connection is
cut, an abandoned statement is executed, another process appends, a failover or a restore takes the end of the
log, an erasure empties a body.

A batch is one report, since a batch is judged and appended as a whole. Nothing but recording is modelled.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

from tests.model.invariants import NOTHING, Fact, violations

PROCESSES: Final = (0, 1)
ORDERS: Final = ("X", "Y")


@dataclass(frozen=True)
class Rules:
    """What the code does to keep the invariants. Each can be left out, to show that the model needs it.

    Attributes:
        proves: an append carries what its decision relies on, and fails if the log has lost that.
        forgets: a process forgets what it has seen when its connection is opened, or when the log went back.
        searches_again: each attempt under the lock first searches for every event in doubt, and sees what was
            committed before it took the lock.
        leaves_out: nothing is begun for a report whose caller was answered.
    """

    proves: bool = True
    forgets: bool = True
    searches_again: bool = True
    leaves_out: bool = True


class Disturbances(NamedTuple):
    """How often each disturbance may still happen."""

    cuts: int = 1
    failovers: int = 1
    restores: int = 1
    refusals: int = 1
    erasures: int = 1


class Logged(NamedTuple):
    """An event in the log, or one to append. ``body`` is empty after an erasure."""

    order: str
    version: int
    report: int
    judged_from: int | None
    body: str = "body"


class Place(NamedTuple):
    """An event that a process has seen, and its place in the log."""

    position: int
    report: int


class Statement(NamedTuple):
    """An append. ``result`` is None until it is executed, and ``position`` is 0 unless it has appended."""

    event: Logged
    proofs: tuple[Place, ...]
    result: Literal["appended", "taken", "went_back"] | None = None
    position: int = 0


Phase: TypeAlias = Literal["idle", "waiting", "decided", "sent", "failed", "begun", "locked"]


class Process(NamedTuple):
    """One process.

    Attributes:
        phase: what it does for its report; ``begun`` waits for the lock in a transaction, ``locked`` has it.
        report: its report, and the report's order.
        cache: the orders' states that it has cached: version and last report.
        last: its last commit.
        statement: the append that it has decided on or sent.
        doubtful: the events that may have been committed.
        snapshot: the log as its transaction sees it, if that was taken before the lock.
    """

    phase: Phase = "idle"
    report: tuple[int, str] | None = None
    cache: tuple[tuple[str, int, int], ...] = ()
    last: Place | None = None
    statement: Statement | None = None
    doubtful: tuple[Logged, ...] = ()
    snapshot: tuple[Logged, ...] | None = None

    @property
    def number(self) -> int | None:
        """The number of its report."""
        return None if self.report is None else self.report[0]


class State(NamedTuple):
    """Everything that the next step can depend on, and the accounts that the invariants compare.

    Attributes:
        log: the events.
        copied: how many events the standby has.
        orphans: appends whose client has gone, and that are not executed yet.
        arrived: how many reports have arrived.
        answered: the reports whose callers were refused.
        acknowledged: the reports whose callers got 200.
        lost: the reports that the log has lost.
        late: the reports that were begun after their callers had been refused.
    """

    log: tuple[Logged, ...] = ()
    copied: int = 0
    processes: tuple[Process, ...] = (Process(),) * len(PROCESSES)
    orphans: tuple[Statement, ...] = ()
    arrived: int = 0
    answered: frozenset[int] = frozenset()
    acknowledged: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()
    late: frozenset[int] = frozenset()
    left: Disturbances = Disturbances()

    def with_process(self, number: int, process: Process) -> "State":
        """Return the state with another state of one process."""
        processes = (*self.processes[:number], process, *self.processes[number + 1 :])
        return self._replace(processes=processes)

    def without(self, disturbance: str) -> "State":
        """Return the state after one disturbance of a kind."""
        return self._replace(left=self.left._replace(**{disturbance: getattr(self.left, disturbance) - 1}))


# The name of a step, and the process, report or number that it is about.
Step: TypeAlias = tuple[str, *tuple[int | str, ...]]


def broken(state: State) -> list[str]:
    """Return which invariants a state breaks."""
    facts = [
        Fact(event.order, event.version, event.report, event.judged_from, event.report) for event in state.log
    ]
    late = [f"the report {report} was begun after its caller had been answered" for report in state.late]
    return violations(facts, state.acknowledged, state.lost) + late


def steps(state: State, rules: Rules, reports: int) -> Iterator[tuple[Step, State]]:
    """Yield every step that is possible in a state, and the state after it.

    Args:
        state: the state.
        rules: what the code does.
        reports: how many reports arrive in all.
    """
    for number, process in enumerate(state.processes):
        if process.phase == "idle" and state.arrived < reports:
            # Orders and processes are alike, so the first report names them.
            for order in ORDERS if state.arrived else ORDERS[:1]:
                if state.arrived or number == 0:
                    yield ("arrive", number, order), _arrive(state, number, order)
        elif process.phase != "idle":
            yield from _work(state, number, process, rules)
    for statement in state.orphans:
        if not _is_locked(state):
            others = tuple(one for one in state.orphans if one is not statement)
            yield (
                ("execute orphan", statement.event.report),
                _execute(state, statement)[0]._replace(orphans=others),
            )
    yield from _disturb(state, rules)


def _arrive(state: State, number: int, order: str) -> State:
    process = state.processes[number]._replace(phase="waiting", report=(state.arrived, order))
    return state.with_process(number, process)._replace(arrived=state.arrived + 1)


def _work(state: State, number: int, process: Process, rules: Rules) -> Iterator[tuple[Step, State]]:
    """Yield the next step of a process for its report."""
    if process.phase == "waiting":
        decided = process._replace(phase="decided", statement=_decide(state, process, rules))
        yield ("decide", number), state.with_process(number, decided)
    elif process.phase == "decided":
        if rules.leaves_out and process.number in state.answered:
            yield ("leave out", number), _finish(state, number, process)
        else:
            yield ("send", number), _begin(state.with_process(number, process._replace(phase="sent")), process)
    elif process.phase == "sent":
        yield from _work_on_sent(state, number, process, rules)
    elif process.phase == "failed":
        snapshot = None if rules.searches_again else state.log
        begun = process._replace(phase="begun", snapshot=snapshot)
        yield ("begin", number), state.with_process(number, begun)
    elif process.phase == "locked":
        yield from _record_locked(state, number, process, rules)
    elif not _is_locked(state):
        yield ("lock", number), state.with_process(number, process._replace(phase="locked"))


def _work_on_sent(state: State, number: int, process: Process, rules: Rules) -> Iterator[tuple[Step, State]]:
    """Yield the execution of a process's append, or the arrival of its result."""
    statement = process.statement
    assert statement is not None
    if statement.result == "appended":
        yield ("confirm", number), _commit(state, number, process, statement.event, statement.position)
    elif statement.result is not None:
        yield ("fail", number), state.with_process(number, _fail(process, statement.result, rules))
    elif not _is_locked(state):
        after, executed = _execute(state, statement)
        yield ("execute", number), after.with_process(number, process._replace(statement=executed))


def _decide(state: State, process: Process, rules: Rules) -> Statement:
    """Decide from the cached state, or else from the log."""
    assert process.report is not None
    report, order = process.report
    proofs = [] if process.last is None else [process.last]
    for known, version, last in process.cache:
        if known == order:
            return Statement(Logged(order, version + 1, report, last), tuple(proofs) if rules.proves else ())
    position, event = _last_of(state.log, order)
    if event is None:
        decided = Logged(order, 1, report, NOTHING)
    else:
        decided = Logged(order, event.version + 1, report, event.report)
        proofs.append(Place(position, event.report))
    return Statement(decided, tuple(proofs) if rules.proves else ())


def _execute(state: State, statement: Statement) -> tuple[State, Statement]:
    """Append, unless the version is taken or the log has lost what the decision relies on."""
    event = statement.event
    if any(not _has(state.log, place) for place in statement.proofs):
        return state, statement._replace(result="went_back")
    if any((one.order, one.version) == (event.order, event.version) for one in state.log):
        return state, statement._replace(result="taken")
    executed = statement._replace(result="appended", position=len(state.log) + 1)
    return state._replace(log=(*state.log, event)), executed


def _record_locked(state: State, number: int, process: Process, rules: Rules) -> Iterator[tuple[Step, State]]:
    """Search for what is in doubt, or else decide again and append; then free the lock."""
    assert process.report is not None
    report, order = process.report
    seen = state.log if process.snapshot is None else process.snapshot
    for event in process.doubtful:
        if position := _position(seen, event):
            yield ("find", number), _commit(state, number, process, event, position)
            return
    if rules.leaves_out and report in state.answered:
        yield ("leave out", number), _finish(state, number, process)
        return
    _, last = _last_of(seen, order)
    judged_from = (0, NOTHING) if last is None else (last.version, last.report)
    event = Logged(order, judged_from[0] + 1, report, judged_from[1])
    chain = (process.last,) if rules.proves and process.last is not None else ()
    after, executed = _execute(state, Statement(event, chain))
    after = _begin(after, process)
    if executed.result != "appended":
        yield ("fail", number), after.with_process(number, _fail(process, executed.result, rules))
        return
    yield ("append", number), _commit(after, number, process, event, executed.position)
    if state.left.cuts:
        # The connection is cut after the commit.
        doubtful = _reopen(process, rules)._replace(phase="failed", doubtful=(*process.doubtful, event))
        yield ("append and cut", number), after.with_process(number, doubtful).without("cuts")


def _fail(process: Process, result: str | None, rules: Rules) -> Process:
    """Return a process whose append was refused: it tries again under the lock."""
    failed = process._replace(phase="failed", statement=None)
    if not rules.searches_again:
        # The search was made once.
        failed = failed._replace(doubtful=())
    if result == "went_back":
        failed = failed._replace(last=None, cache=() if rules.forgets else process.cache)
    return failed


def _begin(state: State, process: Process) -> State:
    """Note that an append is sent for a report."""
    assert process.report is not None
    report, _ = process.report
    return state._replace(late=state.late | {report}) if report in state.answered else state


def _commit(state: State, number: int, process: Process, event: Logged, position: int) -> State:
    """Acknowledge a report, and cache what was learned."""
    others = (known for known in process.cache if known[0] != event.order)
    cache = tuple(sorted([*others, (event.order, event.version, event.report)]))
    learned = process._replace(cache=cache, last=Place(position, event.report))
    acknowledged = state.acknowledged | ({event.report} - state.answered)
    return _finish(state._replace(acknowledged=acknowledged), number, learned)


def _finish(state: State, number: int, process: Process) -> State:
    return state.with_process(number, Process(cache=process.cache, last=process.last))


def _disturb(state: State, rules: Rules) -> Iterator[tuple[Step, State]]:
    left = state.left
    if left.failovers and state.copied < len(state.log):
        yield ("copy to standby",), state._replace(copied=state.copied + 1)
    for number, process in enumerate(state.processes):
        if left.cuts and process.phase not in {"idle", "failed"}:
            yield ("cut", number), _cut(state, number, process, rules).without("cuts")
        if left.refusals and process.report is not None and process.report[0] not in state.answered:
            refused = state._replace(answered=state.answered | {process.report[0]})
            yield ("refuse", process.report[0]), refused.without("refusals")
    if left.failovers and state.copied < len(state.log):
        yield ("fail over", state.copied), _fail_over(state, rules)
    if left.restores and not any(process.phase in {"begun", "locked"} for process in state.processes):
        # It waits for transactions that have the table's lock, but a statement may not have arrived yet.
        for kept in range(len(state.log)):
            yield ("restore", kept), _truncate(state, kept).without("restores")
    if left.erasures and any(event.body for event in state.log):
        erased = tuple(event._replace(body="") for event in state.log)
        yield ("erase",), state._replace(log=erased).without("erasures")


def _cut(state: State, number: int, process: Process, rules: Rules) -> State:
    """Cut a process's connection: what it had sent may still be executed."""
    lost = _reopen(process, rules)._replace(statement=None, snapshot=None)
    statement = process.statement
    if process.phase == "sent" and statement is not None:
        lost = lost._replace(phase="failed", doubtful=(statement.event,))
        if statement.result is None:
            state = state._replace(orphans=(*state.orphans, statement))
    else:
        lost = lost._replace(phase="waiting" if process.phase in {"waiting", "decided"} else "failed")
    return state.with_process(number, lost)


def _reopen(process: Process, rules: Rules) -> Process:
    """Return a process whose connection was opened again."""
    return process._replace(cache=()) if rules.forgets else process


def _fail_over(state: State, rules: Rules) -> State:
    """Let the standby take over: every connection is cut, and what was not copied is lost."""
    for number, process in enumerate(state.processes):
        if process.phase == "idle":
            state = state.with_process(number, _reopen(process, rules))
        else:
            state = _cut(state, number, process, rules)
    return _truncate(state, state.copied)._replace(orphans=(), copied=0).without("failovers")


def _truncate(state: State, kept: int) -> State:
    lost = state.lost | {event.report for event in state.log[kept:]}
    return state._replace(log=state.log[:kept], copied=min(state.copied, kept), lost=lost)


def _is_locked(state: State) -> bool:
    return any(process.phase == "locked" for process in state.processes)


def _last_of(log: tuple[Logged, ...], order: str) -> tuple[int, Logged | None]:
    found = [(at, event) for at, event in enumerate(log, 1) if event.order == order]
    return found[-1] if found else (0, None)


def _has(log: tuple[Logged, ...], place: Place) -> bool:
    return place.position <= len(log) and log[place.position - 1].report == place.report


def _position(log: tuple[Logged, ...], event: Logged) -> int:
    """Return the position of an event, 0 if the log does not have it. An erasure leaves the report's id."""
    found = (at for at, one in enumerate(log, 1) if one._replace(body=event.body) == event)
    return next(found, 0)
