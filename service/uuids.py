"""Random UUIDs for reports and requests, made from randomness that the system gives for many at once."""

import os
from collections import deque
from typing import Final

# Asking the system for each UUID, as uuid4 does, costs more than the rest of making it.
UUIDS_PER_READ: Final = 256
_UUID_BYTES: Final = 16
# The hex digit of the variant of RFC 9562, for each value of the digit that it replaces.
_VARIANTS: Final = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))

_random: Final[deque[str]] = deque()
# Two processes must never make the same ones.
os.register_at_fork(after_in_child=_random.clear)


def make_uuid() -> str:
    """Return a new UUID of version 4."""
    if not _random:
        digits = os.urandom(UUIDS_PER_READ * _UUID_BYTES).hex()
        length = 2 * _UUID_BYTES
        _random.extend(digits[at : at + length] for at in range(0, len(digits), length))
    one = _random.popleft()
    return f"{one[:8]}-{one[8:12]}-4{one[13:16]}-{_VARIANTS[one[16]]}{one[17:20]}-{one[20:]}"
