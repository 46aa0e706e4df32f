"""The run of subscriptions: it connects their parts to the core."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from domain.order import Order
from service.core import Core
from service.event_log.follow import Log, place_of
from service.feature import Contribution, Task
from service.features.subscriptions.api import SubscriptionsApi
from service.features.subscriptions.dispatcher import Dispatcher
from service.features.subscriptions.metrics import measure, read_metrics
from service.features.subscriptions.pages import DeliveryPages
from service.features.subscriptions.progress import Progress
from service.features.subscriptions.sending import REQUESTS, Sender
from service.features.subscriptions.settings import SubscriptionsSettings

TASK: Final = "deliver"


@asynccontextmanager
async def run(core: Core) -> AsyncIterator[Contribution]:
    """Run the deliveries until the block ends."""
    settings = core.settings_as(SubscriptionsSettings)
    # A position that is lost in a crash of the server costs repeats, so no save waits for the disk.
    progress = Progress(core.make_hot(synchronous_commit="off"))
    sender = Sender(settings.subscription_networks, core.identity, budgets=core.budgets)
    dispatcher = Dispatcher(
        progress,
        Log(core.make_hot(), core.memory),
        sender,
        settings.subscription_retry_seconds,
        count_losses=lambda: core.tail.losses,
    )

    def observe_commit(events: Sequence[Order.StatusReported], positions: Sequence[int]) -> None:
        dispatcher.observe_commit(place_of(positions[-1], events[-1]), core.recorder.losses)
        dispatcher.pace.observe_commit(len(events))

    yield Contribution(
        tasks=(Task(TASK, dispatcher.run),),
        apis=(SubscriptionsApi(core.pool, dispatcher, sender),),
        outgoing=REQUESTS,
        pages=DeliveryPages(core.pool, dispatcher, sender).pages(),
        measure=partial(measure, dispatcher.outcomes),
        read_metrics=read_metrics,
        on_commit=observe_commit,
        wake=dispatcher.wake,
    )
    await dispatcher.stop()
