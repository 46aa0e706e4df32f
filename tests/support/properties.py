"""How many examples the property tests try."""

import os
from typing import Final

from hypothesis import settings

_GIVEN: Final = os.environ.get("TEST_EXAMPLES")
# The same examples in every run, unless TEST_EXAMPLES asks for that many new ones, as `make test-long` does.
MANY: Final = settings(deadline=None, derandomize=_GIVEN is None, max_examples=int(_GIVEN or 100))
