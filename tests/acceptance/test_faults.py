"""The short selection of ``make faults``, and the proof that the harness finds what it is there to find."""

import pytest

from tests.faults.faults import FAULTS, Fault
from tests.faults.mutations import MUTATIONS
from tests.faults.run import run
from tests.faults.world import ViolatedError

SEED = 1


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in FAULTS if fault.is_short])
async def test_what_is_promised_holds_whatever_breaks(fault: Fault) -> None:
    """Nothing acknowledged is lost, nothing recorded twice, views follow, and resources come back."""
    outcome = await run(fault, SEED)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    outcome.raise_where_violated()
    assert outcome.count.acknowledged > 0


@pytest.mark.parametrize("mutation", [pytest.param(mutation, id=mutation.name) for mutation in MUTATIONS])
async def test_a_service_that_acknowledges_too_early_is_found_out(mutation: Fault) -> None:
    """With 200 before the commit, or a commit that is not on disk, the account shows what was lost."""
    outcome = await run(mutation, SEED)
    assert outcome.count.lost > 0
    with pytest.raises(ViolatedError, match="acknowledged and not there"):
        outcome.raise_where_violated()
