"""A short selection of ``make faults``, and the proof that the harness finds faults."""

import subprocess
import sys

import pytest

from tests.faults.fault import Fault
from tests.faults.faults import FAULTS
from tests.faults.mutations import MUTATIONS
from tests.faults.run import run
from tests.faults.world import SHORT, UNTIMED, Effort, ViolatedError

SEED = 1


async def assert_held(fault: Fault, effort: Effort) -> None:
    outcome = await run(fault, effort, SEED)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    outcome.raise_where_violated()
    assert outcome.count.acknowledged > 0


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in FAULTS if fault.is_short])
async def test_the_promises_hold_through_a_fault(fault: Fault) -> None:
    """The service loses no acknowledged report, records none twice, updates its views and releases its
    resources.

    The test takes about 10 s, because each fault has its own service, load and account.
    """
    await assert_held(fault, SHORT)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in FAULTS])
async def test_the_promises_hold_through_every_fault(fault: Fault) -> None:
    """The same promises hold for every fault, several times each. ``make faults`` also has time limits."""
    await assert_held(fault, UNTIMED)


FINDINGS = {
    "asynchronous-commit": "recorded less often than acknowledged",
    "early-acknowledgement": "recorded less often than acknowledged",
    "asynchronous-standby": "recorded less often than acknowledged",
    "keep-memory": "versions after a gap",
    "believe-positions": "a stream after the lost position",
    "retry-blindly": "bodies recorded more often than sent|report_ids in more than one event",
    "use-defaults": "reports were refused",
    "require-notifications": "reports were refused",
    "use-first-time-limit": "refused too early",
    "stay-silent": "the log does not give the cause lock_held",
    "trust-connections": "reports were refused after an idle time",
    "forget-held": "lost deliveries",
    "pass-held": "deliveries out of order",
    "forget-delivered": "delivered events are lost, and the subscription is not paused",
    "sign-anything": "is not continued",
    "lock-table-to-erase": "an erasure waits for VACUUM",
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(mutation, id=mutation.name, marks=[] if mutation.is_short else [pytest.mark.long])
        for mutation in MUTATIONS
    ],
)
async def test_the_harness_finds_a_mutation(mutation: Fault) -> None:
    """Each deliberate fault of the service or of its server turns out red, for the expected reason.

    The test takes about 10 s, as above.
    """
    outcome = await run(mutation, SHORT, SEED)
    with pytest.raises(ViolatedError, match=FINDINGS[mutation.name]):
        outcome.raise_where_violated()


def test_each_mutant_replaces_code_that_is_there() -> None:
    """A mutant names the code that it replaces. After a change of that name, it would have no effect."""
    install = "from tests.faults.mutants import MUTANTS\nfor install in MUTANTS.values(): install()"
    done = subprocess.run([sys.executable, "-c", install], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
