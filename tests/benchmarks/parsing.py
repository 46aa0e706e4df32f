"""The time to parse a hostile body, as a multiple of orjson's own time."""

import timeit
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

import orjson

from domain.order import Arrival
from service.ingest.parser import UnreadableError, parse
from tests.benchmarks.report import Row

BODY_BYTES: Final = 65_536
RATIO_MAX: Final = 10.0
REPEATS: Final = 5
CALLS: Final = 20

HEAD: Final = rb'{"order_no":"KOM1","status":"Dikirim\n",'


def filled(prefix: bytes, unit: bytes, suffix: bytes) -> bytes:
    """Return a body of almost BODY_BYTES bytes."""
    return prefix + unit * ((BODY_BYTES - len(prefix) - len(suffix)) // len(unit)) + suffix


# All bodies have an escape in the status, which selects the parser's slowest path.
BODIES: Final = {
    "keys": HEAD + b",".join(b'"k%05d":0' % number for number in range((BODY_BYTES - 60) // 11)) + b"}",
    "escaped keys": HEAD + b",".join(rb'"\u006b%04d":0' % n for n in range((BODY_BYTES - 60) // 15)) + b"}",
    "the same key": filled(HEAD, b'"status":"Dikirim",', b'"x":1}'),
    "empty keys": filled(HEAD, b'"":1,', b'"x":1}'),
    "backslashes": filled(HEAD + b'"x":"', rb"\\", b'"}'),
    "escapes": filled(HEAD + b'"x":"', rb"\u0041", b'"}'),
    "strings of a backslash": filled(HEAD + b'"x":[', rb'"\\",', b"1]}"),
    "objects": filled(HEAD + b'"x":[', b"{},", b"1]}"),
    "our keys as values": filled(HEAD + b'"x":[', b'"status",', b"1]}"),
    "numbers": filled(HEAD + b'"x":[', b"1,", b"1]}"),
    "digits": filled(HEAD + b'"x":0.', b"1", b"}"),
    "spaces": filled(HEAD, b" ", b'"x":1}'),
}


ARRIVAL: Final = Arrival("id", datetime.now(UTC))


def measure_parsing() -> list[Row]:
    """Return one row, for the slowest of the hostile bodies."""

    def read(body: bytes) -> None:
        with suppress(UnreadableError):
            parse(body, ARRIVAL)

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
