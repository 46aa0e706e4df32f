"""Run one fault, from its start to its account."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from tests.faults.fault import Fault
from tests.faults.world import Effort, SkippedError, ViolatedError, open_world
from tests.support import account
from tests.support.account import Count
from tests.support.load import NotRecoveredError

NO_COUNT: Final = Count()


@dataclass
class Outcome:
    """A row of the table."""

    fault: Fault
    times: int = 0
    count: Count = NO_COUNT
    worst_outage: float = 0.0
    seconds: float = 0.0
    skipped: str = ""
    told: str = ""
    remarks: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def raise_where_violated(self) -> None:
        """Raise ViolatedError if the service broke a promise."""
        if self.violations:
            raise ViolatedError(self.fault.name, self.violations)


async def run(fault: Fault, effort: Effort, seed: int) -> Outcome:
    """Break a new world, and return the outcome."""
    outcome = Outcome(fault)
    began = time.monotonic()
    try:
        async with open_world(fault.layout, effort, seed) as world:
            outcome.remarks = world.remarks
            world.violations.lines = outcome.violations
            since = time.monotonic()
            # The account is made even if the fault itself failed.
            with _noted(outcome):
                outcome.times = await fault.break_it(world)
            with _noted(outcome):
                if fault.layout.has_load:
                    await world.load.recovered()
            with _noted(outcome):
                outcome.count = await world.settle(fault.told)
            outcome.told = world.operator.summary(fault.told)
            outcome.worst_outage = account.worst_outage(world.acknowledged(), since)
    except SkippedError as error:
        outcome.skipped = str(error)
    except NotRecoveredError as error:
        outcome.violations.append(f"before anything was broken: {error}")
    outcome.seconds = time.monotonic() - began
    return outcome


@contextmanager
def _noted(outcome: Outcome) -> Iterator[None]:
    try:
        yield
    except SkippedError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, something did not go as promised
        outcome.violations.append(f"{type(error).__name__}: {error}")
