"""The run of proofs: it connects the tree, its signer and its API to the core."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from domain.order import Order
from projections import timeline
from service.core import Core
from service.feature import Contribution, Task
from service.features.proofs.api import HistoryApi
from service.features.proofs.follower import Follower
from service.features.proofs.metrics import read_metrics
from service.features.proofs.pages import ProofPages
from service.features.proofs.settings import ProofsSettings
from service.features.proofs.signer import make_signer

TASK: Final = "add to the history"


@asynccontextmanager
async def run(core: Core) -> AsyncIterator[Contribution]:
    """Follow the log with the tree until the block ends."""
    settings = core.settings_as(ProofsSettings)
    signer = make_signer(settings)
    # An entry that is signed must survive a crash of the server.
    follower = Follower(core.make_hot(synchronous_commit="on"), core.memory, signer)
    committed = 0

    def observe_commit(_events: Sequence[Order.StatusReported], positions: Sequence[int]) -> None:
        nonlocal committed
        committed = positions[-1]

    def wake() -> None:
        follower.notice(committed)
        follower.wake.set()

    yield Contribution(
        tasks=(Task(TASK, follower.run),),
        apis=(
            HistoryApi(
                *(core.pool, signer, follower.reach, partial(core.wait_for_view, timeline.VIEW.name)),
                is_public=settings.history_public,
            ),
        ),
        pages=ProofPages(core.pool, signer).pages(),
        read_metrics=lambda connection: read_metrics(connection, signer),
        on_commit=observe_commit,
        wake=wake,
    )
