"""The order tracking service: it records every webhook of Komerce as an immutable event and serves what follows.

It may import ``projections`` and ``domain``, and neither of them imports it.
Start reading at ``service/ingest/webhook.py`` for the path of a report, or at ``service/app.py`` for the wiring.
"""

from typing import Final

# A test compares it with the version in pyproject.toml.
VERSION: Final = "0.1.0"
