"""The number of examples that a property test tries."""

import os
from typing import Final

from hypothesis import settings

_GIVEN: Final = os.environ.get("TEST_EXAMPLES")
# Every run uses the same examples. If TEST_EXAMPLES is set, as in `make test-long`, a run tries that many
# random examples instead.
MANY: Final = settings(deadline=None, derandomize=_GIVEN is None, max_examples=int(_GIVEN or 100))
