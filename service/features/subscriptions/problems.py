"""The problem types of subscriptions."""

from enum import Enum

from service.http.problems import Explained


class SubscriptionProblem(Explained, Enum):
    """The problem types of subscriptions."""

    UNKNOWN_SUBSCRIPTION = 404, "Unknown subscription", "There is no subscription with this id."
    NOT_HELD = 404, "Not held", "The subscription does not hold this order."
    TOO_MANY_SUBSCRIPTIONS = 409, "Too many subscriptions", "Remove a subscription before you add another one."
    NOT_BACK = (
        409,
        "Not back",
        "A replay goes back: its position must not be above the subscription's, or events would be left out.",
    )
