"""What a hostile body costs to read, against what orjson alone needs for it."""

import timeit
from contextlib import suppress
from typing import Final

import orjson

from service.parser import UnreadableError, parse
from tests.benchmarks.report import Row

BODY_BYTES: Final = 65_536
RATIO_MAX: Final = 10.0
REPEATS: Final = 5
CALLS: Final = 20

HEAD: Final = b'{"order_no":"KOM1","status":"Dikirim"'
BODIES: Final = {
    "keys": b",".join([HEAD, *(b'"%07d":0' % number for number in range((BODY_BYTES - 40) // 11))]) + b"}",
    "escaped keys": b",".join([HEAD, *(b'"\\u00%02x%04d":0' % (97, n) for n in range((BODY_BYTES - 40) // 14))])
    + b"}",
    "backslashes": HEAD + b',"x":"' + b"\\" * (BODY_BYTES - 60) + b'"}',
    "the same key": b",".join([HEAD, *[b'"status":"Dikirim"'] * ((BODY_BYTES - 40) // 19)]) + b"}",
}


def measure_parsing() -> list[Row]:
    """One row: the worst of the hostile bodies."""

    def read(body: bytes) -> None:
        with suppress(UnreadableError):
            parse(body, "id")

    found = []
    for name, body in BODIES.items():
        ours = min(timeit.repeat(lambda body=body: read(body), number=CALLS, repeat=REPEATS))  # type: ignore[misc]
        alone = min(timeit.repeat(lambda body=body: orjson.loads(body), number=CALLS, repeat=REPEATS))  # type: ignore[misc]
        found.append((ours / alone, name, ours / CALLS * 1e3))
    worst, _, _ = max(found)
    figures = "; ".join(
        f"{name} {milliseconds:.2f} ms, {times:.1f} times" for times, name, milliseconds in found
    )
    what = "reading 64 KiB of a hostile body, as a multiple of orjson's own time"
    return [Row(what, f"{worst:.1f}", f"<= {RATIO_MAX:g}", worst <= RATIO_MAX, figures)]
