"""The protocol of recording as a small model: states, and the steps that lead from one to the next.

Two processes append to one log. Each step is one that nothing can interrupt: what PostgreSQL does in one
statement, or what a process does between two awaits. Anything else may happen in between: a connection is
cut, an abandoned statement is executed, another process appends, a failover or a restore takes the end of the
log, an erasure empties a body.

A batch is one report, since a batch is judged and appended as a whole. Beside it, a process may record one
report with an idempotency key: both share what the process has seen, and take turns on its connection. Nothing
but recording is modelled.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

from tests.model.invariants import NOTHING, Fact, violations

# The process of each worker. Worker 1 records reports with keys, beside worker 0.
PROCESS_OF: Final = (0, 0, 1)
KEYED: Final = 1
ORDERS: Final = ("X", "Y")


@dataclass(frozen=True)
class Rules:
    """What the code does to keep the invariants. Each can be left out, to show that the model needs it.

    Attributes:
        proves: an append carries what its decision relies on, and fails if the log has lost that.
        forgets: a process forgets what it has seen whenever it reconnects, and whenever a proof fails.
        searches_again: each attempt under the lock first searches for every event in doubt, in a snapshot that
            was taken under the lock.
        leaves_out: nothing is begun for a report whose caller was answered.
        keeps_proof: a decision is sent with the last commit that it was made from, not with a later one.
        moves_forward: the last commit is never replaced by an earlier one.
        tells_apart: a proof tells an event from a second one of the same report at the same place.
    """

    proves: bool = True
    forgets: bool = True
    searches_again: bool = True
    leaves_out: bool = True
    keeps_proof: bool = True
    moves_forward: bool = True
    tells_apart: bool = True


class Disturbances(NamedTuple):
    """How often each disturbance may still happen."""

    cuts: int = 1
    failovers: int = 1
    restores: int = 1
    refusals: int = 1
    erasures: int = 1


class Logged(NamedTuple):
    """An event in the log, or one to append.

    Attributes:
        body: empty after an erasure.
        recorded_at: counts the appends; no two events have the same.
    """

    order: str
    version: int
    report: int
    judged_from: int | None
    body: str = "body"
    recorded_at: int = 0


class Place(NamedTuple):
    """An event that a process has seen, and its place in the log."""

    position: int
    recorded_at: int


class Statement(NamedTuple):
    """An append. ``result`` is None until it is executed, and ``place`` is None unless it has appended."""

    event: Logged
    proofs: tuple[Place, ...]
    result: Literal["appended", "taken", "went_back"] | None = None
    place: Place | None = None


Phase: TypeAlias = Literal["absent", "idle", "waiting", "decided", "sent", "failed", "begun", "locked"]
# The phases in which a worker uses its process's connection.
USING: Final = frozenset({"sent", "begun", "locked"})


class Memory(NamedTuple):
    """What a process has seen of the log.

    Attributes:
        cache: the orders' states: version and last report.
        last: its last commit.
        went_back: whether the log was found to have lost something, and that is not yet forgotten.
    """

    cache: tuple[tuple[str, int, int], ...] = ()
    last: Place | None = None
    went_back: bool = False


class Worker(NamedTuple):
    """One worker of a process: its batches, or its reports with keys.

    Attributes:
        phase: what it does for its report; ``absent`` never has any, ``begun`` waits for the lock in a
            transaction, ``locked`` has it.
        report: its report, and the report's order.
        statement: the append that it has decided on or sent.
        doubtful: the events that may have been committed.
        snapshot: the log as its transaction sees it, if that was taken before the lock.
    """

    phase: Phase = "idle"
    report: tuple[int, str] | None = None
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
        appends: how many events were ever appended.
        copied: how many events the standby has.
        orphans: appends whose client has gone, and that are not executed yet.
        arrived: how many reports have arrived.
        answered: the reports whose callers were refused.
        acknowledged: the reports whose callers got 200.
        lost: the reports that the log has lost.
        late: the reports that were begun after their callers had been refused.
    """

    log: tuple[Logged, ...] = ()
    appends: int = 0
    copied: int = 0
    workers: tuple[Worker, ...] = (Worker(),) * len(PROCESS_OF)
    memories: tuple[Memory, ...] = (Memory(),) * (max(PROCESS_OF) + 1)
    orphans: tuple[Statement, ...] = ()
    arrived: int = 0
    answered: frozenset[int] = frozenset()
    acknowledged: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()
    late: frozenset[int] = frozenset()
    left: Disturbances = Disturbances()

    def with_worker(self, number: int, worker: Worker) -> "State":
        """Return the state with another state of one worker."""
        return self._replace(workers=(*self.workers[:number], worker, *self.workers[number + 1 :]))

    def memory_of(self, number: int) -> Memory:
        """Return what a worker's process has seen."""
        return self.memories[PROCESS_OF[number]]

    def with_memory(self, number: int, memory: Memory) -> "State":
        """Return the state with another memory of a worker's process."""
        at = PROCESS_OF[number]
        return self._replace(memories=(*self.memories[:at], memory, *self.memories[at + 1 :]))

    def is_turn_of(self, number: int) -> bool:
        """Return whether no other worker uses the connection of a worker's process."""
        return not any(
            other != number and PROCESS_OF[other] == PROCESS_OF[number] and worker.phase in USING
            for other, worker in enumerate(self.workers)
        )

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
    for number, worker in enumerate(state.workers):
        if worker.phase == "idle" and state.arrived < reports:
            # Orders and processes are alike, so the first report names them.
            for order in ORDERS if state.arrived else ORDERS[:1]:
                if state.arrived or PROCESS_OF[number] == 0:
                    yield ("arrive", number, order), _arrive(state, number, order)
        elif worker.phase not in {"absent", "idle"}:
            yield from _work(state, number, worker, rules)
    for statement in state.orphans:
        if not _is_locked(state):
            others = tuple(one for one in state.orphans if one is not statement)
            after = _execute(state, statement, rules)[0]._replace(orphans=others)
            yield ("execute orphan", statement.event.report), after
    yield from _disturb(state, rules)


def _arrive(state: State, number: int, order: str) -> State:
    # A report with a key is always recorded under the lock.
    worker = Worker(phase="failed" if number == KEYED else "waiting", report=(state.arrived, order))
    return state.with_worker(number, worker)._replace(arrived=state.arrived + 1)


def _work(state: State, number: int, worker: Worker, rules: Rules) -> Iterator[tuple[Step, State]]:
    """Yield the next step of a worker for its report."""
    if worker.phase == "waiting":
        decided = worker._replace(phase="decided", statement=_decide(state, number, worker, rules))
        yield ("decide", number), state.with_worker(number, decided)
    elif worker.phase == "decided":
        yield from _send(state, number, worker, rules)
    elif worker.phase == "sent":
        yield from _work_on_sent(state, number, worker, rules)
    elif worker.phase == "failed":
        if state.is_turn_of(number):
            snapshot = None if rules.searches_again else state.log
            yield (
                ("begin", number),
                state.with_worker(number, worker._replace(phase="begun", snapshot=snapshot)),
            )
    elif worker.phase == "locked":
        yield from _record_locked(state, number, worker, rules)
    elif not _is_locked(state):
        yield ("lock", number), _lock(state, number, worker, rules)


def _decide(state: State, number: int, worker: Worker, rules: Rules) -> Statement:
    """Decide from the cached state, or else from the log."""
    assert worker.report is not None
    report, order = worker.report
    memory = state.memory_of(number)
    proofs = [] if memory.last is None else [memory.last]
    for known, version, last in memory.cache:
        if known == order:
            return Statement(Logged(order, version + 1, report, last), tuple(proofs) if rules.proves else ())
    position, event = _last_of(state.log, order)
    if event is None:
        decided = Logged(order, 1, report, NOTHING)
    else:
        decided = Logged(order, event.version + 1, report, event.report)
        proofs.append(Place(position, event.recorded_at))
    return Statement(decided, tuple(proofs) if rules.proves else ())


def _send(state: State, number: int, worker: Worker, rules: Rules) -> Iterator[tuple[Step, State]]:
    """Yield the sending of a decided append, with the last commit as it is now."""
    assert worker.statement is not None
    if rules.leaves_out and worker.number in state.answered:
        yield ("leave out", number), state.with_worker(number, Worker())
    elif state.is_turn_of(number):
        last = state.memory_of(number).last
        proofs = worker.statement.proofs if rules.keeps_proof else ()
        if rules.proves and last is not None:
            proofs = tuple(sorted({*proofs, last}))
        sent = worker._replace(phase="sent", statement=worker.statement._replace(proofs=proofs))
        yield ("send", number), _begin(state.with_worker(number, sent), worker)


def _work_on_sent(state: State, number: int, worker: Worker, rules: Rules) -> Iterator[tuple[Step, State]]:
    """Yield the execution of a worker's append, or the arrival of its result."""
    statement = worker.statement
    assert statement is not None
    if statement.place is not None:
        after = _commit(state, number, statement.event, statement.place, rules)
        yield ("confirm", number), after
    elif statement.result is not None:
        yield ("fail", number), _fail(state, number, worker, statement.result, rules)
    elif not _is_locked(state):
        after, executed = _execute(state, statement, rules)
        yield ("execute", number), after.with_worker(number, worker._replace(statement=executed))


def _execute(state: State, statement: Statement, rules: Rules) -> tuple[State, Statement]:
    """Append, unless the version is taken or the log has lost what the decision relies on."""
    event = statement.event
    if any(not _has(state.log, place) for place in statement.proofs):
        return state, statement._replace(result="went_back")
    if any((one.order, one.version) == (event.order, event.version) for one in state.log):
        return state, statement._replace(result="taken")
    appends = state.appends + 1
    recorded = event._replace(recorded_at=appends if rules.tells_apart else event.report)
    place = Place(len(state.log) + 1, recorded.recorded_at)
    after = state._replace(log=(*state.log, recorded), appends=appends)
    return after, statement._replace(result="appended", place=place)


def _lock(state: State, number: int, worker: Worker, rules: Rules) -> State:
    """Take the lock, and forget what was seen if the log went back."""
    memory = state.memory_of(number)
    if memory.went_back:
        state = state.with_memory(number, Memory(cache=() if rules.forgets else memory.cache))
    return state.with_worker(number, worker._replace(phase="locked"))


def _record_locked(state: State, number: int, worker: Worker, rules: Rules) -> Iterator[tuple[Step, State]]:
    """Search for what is in doubt, or else decide again and append; then free the lock."""
    assert worker.report is not None
    report, order = worker.report
    seen = state.log if worker.snapshot is None else worker.snapshot
    for event in worker.doubtful:
        if (place := _place(seen, event)) is not None:
            memory = state.memory_of(number)
            if rules.proves and memory.last is not None and not _has(state.log, memory.last):
                # It proves only itself: it may be from a late statement.
                state = state.with_memory(number, Memory(cache=() if rules.forgets else memory.cache))
            yield ("find", number), _commit(state, number, event, place, rules)
            return
    if rules.leaves_out and report in state.answered:
        yield ("leave out", number), state.with_worker(number, Worker())
        return
    _, before = _last_of(seen, order)
    version, judged_from = (0, NOTHING) if before is None else (before.version, before.report)
    event = Logged(order, version + 1, report, judged_from)
    last = state.memory_of(number).last
    chain = (last,) if rules.proves and last is not None else ()
    after, executed = _execute(state, Statement(event, chain), rules)
    after = _begin(after, worker)
    if executed.place is None:
        yield ("fail", number), _fail(after, number, worker, executed.result, rules)
        return
    yield ("append", number), _commit(after, number, event, executed.place, rules)
    if state.left.cuts:
        # The connection is cut after the commit.
        doubtful = worker._replace(phase="failed", doubtful=(*worker.doubtful, event))
        cut = _reopen(after, number, rules).with_worker(number, doubtful)
        yield ("append and cut", number), cut.without("cuts")


def _fail(state: State, number: int, worker: Worker, result: str | None, rules: Rules) -> State:
    """Return the state after an append was refused: the worker tries again under the lock."""
    failed = worker._replace(phase="failed", statement=None)
    if not rules.searches_again:
        # The search was made once.
        failed = failed._replace(doubtful=())
    if result == "went_back":
        state = state.with_memory(number, state.memory_of(number)._replace(went_back=True))
    return state.with_worker(number, failed)


def _begin(state: State, worker: Worker) -> State:
    """Note that an append is sent for a report."""
    assert worker.number is not None
    return state._replace(late=state.late | {worker.number}) if worker.number in state.answered else state


def _commit(state: State, number: int, event: Logged, place: Place, rules: Rules) -> State:
    """Acknowledge a report, and remember what was learned."""
    memory = state.memory_of(number)
    others = (known for known in memory.cache if known[0] != event.order)
    cache = tuple(sorted([*others, (event.order, event.version, event.report)]))
    last = place
    if rules.moves_forward and memory.last is not None and memory.last.position >= place.position:
        last = memory.last
    acknowledged = state.acknowledged | ({event.report} - state.answered)
    state = state._replace(acknowledged=acknowledged)
    return state.with_memory(number, memory._replace(cache=cache, last=last)).with_worker(number, Worker())


def _disturb(state: State, rules: Rules) -> Iterator[tuple[Step, State]]:
    left = state.left
    if left.failovers and state.copied < len(state.log):
        yield ("copy to standby",), state._replace(copied=state.copied + 1)
    for number, worker in enumerate(state.workers):
        if left.cuts and worker.phase in USING:
            yield ("cut", number), _cut(state, number, rules).without("cuts")
        if left.refusals and worker.number is not None and worker.number not in state.answered:
            refused = state._replace(answered=state.answered | {worker.number})
            yield ("refuse", worker.number), refused.without("refusals")
    if left.failovers and state.copied < len(state.log):
        yield ("fail over", state.copied), _fail_over(state, rules)
    if left.restores and not any(worker.phase in {"begun", "locked"} for worker in state.workers):
        # It waits for transactions that have the table's lock, but a statement may not have arrived yet.
        for kept in range(len(state.log)):
            yield ("restore", kept), _truncate(state, kept).without("restores")
    if left.erasures and any(event.body for event in state.log):
        erased = tuple(event._replace(body="") for event in state.log)
        yield ("erase",), state._replace(log=erased).without("erasures")


def _cut(state: State, number: int, rules: Rules) -> State:
    """Cut the connection that a worker uses: what it had sent may still be executed."""
    worker = state.workers[number]
    statement = worker.statement
    lost = worker._replace(phase="failed", statement=None, snapshot=None)
    if worker.phase == "sent" and statement is not None:
        lost = lost._replace(doubtful=(statement.event,))
        if statement.result is None:
            state = state._replace(orphans=(*state.orphans, statement))
    return _reopen(state, number, rules).with_worker(number, lost)


def _reopen(state: State, number: int, rules: Rules) -> State:
    """Open a process's connection again."""
    memory = state.memory_of(number)
    return state.with_memory(number, memory._replace(cache=())) if rules.forgets else state


def _fail_over(state: State, rules: Rules) -> State:
    """Let the standby take over: every connection is cut, and what was not copied is lost."""
    for number, worker in enumerate(state.workers):
        state = _cut(state, number, rules) if worker.phase in USING else _reopen(state, number, rules)
    return _truncate(state, state.copied)._replace(orphans=(), copied=0).without("failovers")


def _truncate(state: State, kept: int) -> State:
    lost = state.lost | {event.report for event in state.log[kept:]}
    return state._replace(log=state.log[:kept], copied=min(state.copied, kept), lost=lost)


def _is_locked(state: State) -> bool:
    return any(worker.phase == "locked" for worker in state.workers)


def _last_of(log: tuple[Logged, ...], order: str) -> tuple[int, Logged | None]:
    found = [(at, event) for at, event in enumerate(log, 1) if event.order == order]
    return found[-1] if found else (0, None)


def _has(log: tuple[Logged, ...], place: Place) -> bool:
    return place.position <= len(log) and log[place.position - 1].recorded_at == place.recorded_at


def _place(log: tuple[Logged, ...], event: Logged) -> Place | None:
    """Return the place of an event in doubt, if the log has it. An erasure leaves the report's id."""
    for position, one in enumerate(log, 1):
        if (one.order, one.version, one.report) == (event.order, event.version, event.report):
            return Place(position, one.recorded_at)
    return None
