"""Subscriptions: order events are sent to the shop's own endpoints, in order for each order, at least once.

``delivery`` follows the log for one of them, and ``dispatcher`` shares them out among the processes. Start with
``subscription``, then read ``delivery``.
"""

from typing import Final

from service.feature import Command, Feature

FEATURE: Final = Feature(
    name="subscriptions",
    run="service.features.subscriptions.run:run",
    settings="service.features.subscriptions.settings:SubscriptionsSettings",
    commands=(
        Command(
            "subscriptions",
            "Send order events to your own endpoints: add, list, test, pause, replay, remove.",
            "service.features.subscriptions.commands:subscriptions",
        ),
    ),
    problems="service.features.subscriptions.problems:SubscriptionProblem",
    use="""
        SELECT 'active subscriptions: ' || count(*) FROM public.subscriptions WHERE state = 'active'
        HAVING count(*) > 0
    """,
    while_off="nothing is delivered until the feature is on again, which then sends every event since",
    check="service.features.subscriptions.check:check",
)
