"""A short selection of ``make faults``, and the proof that the harness finds faults."""

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


@pytest.mark.parametrize("mutation", [pytest.param(mutation, id=mutation.name) for mutation in MUTATIONS])
async def test_an_early_acknowledgement_is_found(mutation: Fault) -> None:
    """With 200 before the commit, or a commit that is not on disk, the account finds lost reports.

    The test takes about 10 s, as above.
    """
    outcome = await run(mutation, SHORT, SEED)
    assert outcome.count.lost > 0
    with pytest.raises(ViolatedError, match="recorded less often than acknowledged"):
        outcome.raise_where_violated()
