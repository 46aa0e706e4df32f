"""The settings of subscriptions."""

from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator, IPvAnyNetwork
from pydantic_settings import NoDecode

from service.settings import CoreSettings, split_list

# The attempts to deliver one event of a subscription, and the longest pause before one of them.
ATTEMPTS_MAX: Final = 100
PAUSE_SECONDS_MAX: Final = 7 * 86_400


def _check_pauses(pauses: tuple[float, ...]) -> tuple[float, ...]:
    if not pauses or pauses[0] != 0:
        raise ValueError("the first attempt follows at once: the list must begin with 0, as in 0,5,300")
    if len(pauses) > ATTEMPTS_MAX or not all(0 <= pause <= PAUSE_SECONDS_MAX for pause in pauses):
        raise ValueError(
            f"expected up to {ATTEMPTS_MAX} pauses of 0 to {PAUSE_SECONDS_MAX} seconds, as in 0,5,300"
        )
    return pauses


class SubscriptionsSettings(CoreSettings):
    """The settings of subscriptions."""

    subscription_networks: Annotated[tuple[IPvAnyNetwork, ...], NoDecode, BeforeValidator(split_list)] = ()
    """comma-separated networks that subscriptions may send to, also by http, besides public addresses"""
    subscription_retry_seconds: Annotated[
        tuple[float, ...], NoDecode, BeforeValidator(split_list), AfterValidator(_check_pauses)
    ] = (0, 5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
    """comma-separated seconds before each attempt to deliver an event; the first is 0"""
