"""The service: it records the webhooks of Komerce as immutable events, judges them and serves the results.

It may import ``projections`` and ``domain``, and neither of them imports it.
Start reading at ``ingest/webhook.py`` for the path of a report, or at ``app.py`` for the wiring.
"""

from typing import Final

# A test compares it with the version in pyproject.toml.
VERSION: Final = "0.2.0"
