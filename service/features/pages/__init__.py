"""The web pages show orders, their timelines and the quarantine, in Indonesian and in English.

Start reading at ``handlers.Pages``, which has a method for each page.
"""

from typing import Final

from service.feature import Command, Feature

FEATURE: Final = Feature(
    name="pages",
    run="service.features.pages.run:run",
    settings="service.features.pages.settings:PagesSettings",
    commands=(
        Command(
            "share",
            "Print a link to an order's page for its buyer, who needs no key.",
            "service.features.pages.commands:share",
        ),
        Command(
            "unshare",
            "Revoke a link that 'share', the API or an order's page made.",
            "service.features.pages.commands:unshare",
        ),
    ),
    problems="service.features.pages.shares:ShareProblem",
)
