"""The simulator: it acts as Komerce and as your shop, and accounts for every report and event.

Start reading at ``lifecycles.py`` (what is sent), then ``simulator.py`` (how) and ``account.py`` (the result).
"""

from typing import Final

from service.feature import Command, Feature

FEATURE: Final = Feature(
    name="simulator",
    commands=(
        Command(
            "simulate",
            "Simulate Komerce, then compare the reports sent with those recorded.",
            "service.features.simulator.commands:simulate",
        ),
    ),
)
