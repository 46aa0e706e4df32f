"""Exploration of the model: every reachable state, breadth first.

So a trace to a broken invariant is a shortest one.
"""

from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import NamedTuple

from tests.model.protocol import KEYED, Disturbances, Rules, State, Step, Worker, broken, steps


class Exploration(NamedTuple):
    """The result of an exploration.

    Attributes:
        rules: what the code does.
        states: the number of different states; of all that can be reached, unless one breaks an invariant.
        trace: the steps to the first state that breaks an invariant, if there is one.
        violations: what that state breaks.
        seconds: how long it took.
    """

    rules: Rules
    states: int
    trace: list[Step]
    violations: list[str]
    seconds: float


def explore(rules: Rules, reports: int, left: Disturbances | None = None, *, keyed: bool = True) -> Exploration:
    """Explore every state up to the first one that breaks an invariant.

    Args:
        rules: what the code does.
        reports: how many reports arrive.
        left: how often each disturbance may happen; None for the defaults.
        keyed: whether there are reports with keys.
    """
    began = monotonic()
    first = State(left=left or Disturbances())
    if not keyed:
        first = first.with_worker(KEYED, Worker("absent"))
    came_from: dict[State, tuple[State, Step] | None] = {first: None}
    queue = deque([first])
    while queue:
        state = queue.popleft()
        for step, after in steps(state, rules, reports):
            if after in came_from:
                continue
            came_from[after] = (state, step)
            if violations := broken(after):
                trace = _trace(came_from, after)
                return Exploration(rules, len(came_from), trace, violations, monotonic() - began)
            queue.append(after)
    return Exploration(rules, len(came_from), [], [], monotonic() - began)


def states_of(trace: Sequence[Step], rules: Rules) -> list[State]:
    """Return the state after each step of a trace."""
    states = [State()]
    arrivals = sum(name == "arrive" for name, *_ in trace)
    for step in trace:
        states.append(next(after for name, after in steps(states[-1], rules, arrivals) if name == step))
    return states[1:]


def _trace(came_from: dict[State, tuple[State, Step] | None], state: State) -> list[Step]:
    trace: list[Step] = []
    while (origin := came_from[state]) is not None:
        state, step = origin
        trace.append(step)
    return trace[::-1]
