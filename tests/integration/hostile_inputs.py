"""Hostile inputs, grouped by the expected response, and a raw connection that sends them."""

import gzip
import json
import re
import socket
import unicodedata
from base64 import b64decode
from contextlib import suppress
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from hypothesis import strategies as st

from tests.support.processes import RunningService
from tests.support.waiting import PATIENCE_SECONDS

BODY_BYTES_MAX: Final = 65_536
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
DOCUMENTED: Final = b'{\n"order_no": "KOM1",\n"cnote": "AWB1",\n"status": "Dikirim"\n}'
# The documented body without its closing brace, so that a test can add members.
SENT: Final = b'{"order_no":"KOM1","status":"Dikirim"'
# A body that must never be recorded, sent inside or behind a request that must be refused.
SMUGGLED: Final = b'{"order_no":"SMUGGLED","status":"Dikirim"}'

VERDICTS: Final = {"advanced", "repeated", "late", "refused", "unrecognised"}

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3}) [ -~]*")
_INSIDE: Final = re.compile(rb"Traceback|File \"|aiohttp|asyncpg|[Pp]ython")


def body(**fields: Any) -> bytes:
    """Return the documented body with some fields changed."""
    fields = {"order_no": "KOM1", "cnote": "AWB1", "status": "Dikirim", **fields}
    return json.dumps(fields, ensure_ascii=False).encode()


def filled(prefix: bytes, unit: bytes, suffix: bytes) -> bytes:
    """Return a body of repeated units that is as large as the limit allows."""
    return prefix + unit * ((BODY_BYTES_MAX - len(prefix) - len(suffix)) // len(unit)) + suffix


def request(method: str, path: str, content: bytes = b"", *headers: str) -> bytes:
    """Return a complete request. Header lines are written unchanged."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(content)}", *headers]
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + content


def head(*lines: bytes, method: bytes = b"PUT") -> bytes:
    """Return the head of a webhook request with exactly these header lines."""
    return b"\r\n".join([method + b" /webhook HTTP/1.1", b"Host: localhost", *lines, b"", b""])


def chunked(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)


# Other spellings of the documented report.
UNDERSTOOD: Final = {
    "the documented one": DOCUMENTED,
    "other order": b'{"status":"Dikirim","order_no":"KOM1","cnote":"AWB1"}',
    "white space": b' \r\n\t{ "order_no" : "KOM1",\n"status":"Dikirim" }\n\n',
    "unknown fields": body(weight=1.5, rows=[{"a": None}]),
    "__proto__": b'{"__proto__":{"x":1},"order_no":"KOM1","status":"Dikirim"}',
    "an empty key": b'{"":"","order_no":"KOM1","status":"Dikirim"}',
    "a byte order mark": BYTE_ORDER_MARK + DOCUMENTED,
    "1.10": SENT + b',"price":1.10}',
    "an integer of 30 digits": SENT + b',"n":123456789012345678901234567890}',
    "exactly as large as may be": filled(SENT, b" ", b"}"),
}

STRANGE_ORDER_NOS: Final = {
    "spaces around it": " HOSTILE ",
    "without the spaces": "HOSTILE",
    "a slash": "HOSTILE/1",
    "a question mark": "HOSTILE?1",
    "a hash": "HOSTILE#1",
    "an escaped slash": "HOSTILE%2F1",
    "dots in it": "../HOSTILE/..",
    "three dots": "...",
    "braces": "{HOSTILE}",
    "emoji": "HOSTILE😀",
    "right-to-left override": "\u202eHOSTILE",
    "composed": unicodedata.normalize("NFC", "HOSTÍLE"),
    "decomposed": unicodedata.normalize("NFD", "HOSTÍLE"),
    "cyrillic": "НОЅТІLЕ",  # noqa: RUF001 - look-alikes are the point
    "128 characters": "H" * 128,
    "128 characters of four bytes": "😀" * 128,
}

INJECTIONS: Final = {
    "SQL": "'; DROP TABLE order_events; --",
    "HTML": '<img src=x onerror="alert(1)">',
    "a formula": "=cmd|' /C calc'!A0",
    "a template": "{{7*7}}${7*7}%(x)s",
}

_NO_ORDER_NO: Final = {
    "negative": -1,
    "of 19 digits": 10**18,
    "of 30 digits": 10**29,
    "a float": 1.0,
    "a boolean": True,
    "a list": ["KOM1"],
    "an object": {"no": "KOM1"},
    "null": None,
    "empty": "",
    "blank": " \u00a0\u3000",
    "of 129 characters": "x" * 129,
    "with a line feed": "a\nb",
    "with a delete": "a\x7fb",
    "with a C1 control": "a\x9fb",
    "with a NUL": "a\x00b",
    "one dot": ".",
    "two dots": "..",
}
_NO_STATUS: Final = {
    "null": None,
    "empty": "",
    "blank": " \n",
    "a number": 5,
    "a boolean": True,
    "a list": ["Dikirim"],
    "of 129 characters": "x" * 129,
    "with a NUL": "a\x00b",
}
# Bodies that the parser refuses.
QUARANTINED: Final = {
    **{f"order_no {name}": body(order_no=value) for name, value in _NO_ORDER_NO.items()},
    **{f"status {name}": body(status=value) for name, value in _NO_STATUS.items()},
    "order_no missing": b'{"cnote":"AWB1","status":"Dikirim"}',
    "status missing": b'{"order_no":"KOM1","cnote":"AWB1"}',
    "a lone surrogate, escaped": SENT + rb',"n":"\ud800"}',
    "a lone surrogate, encoded": SENT + b',"n":"\xed\xa0\x80"}',
    "invalid UTF-8": SENT + b',"n":"\xff"}',
    "an overlong encoding": SENT + b',"n":"\xc0\xaf"}',
    "UTF-16": DOCUMENTED.decode().encode("utf-16"),
    "UTF-16 without a mark": DOCUMENTED.decode().encode("utf-16-le"),
    "Latin-1": body(status="Diterimà").decode().encode("latin-1"),
    "order_no twice": SENT + b',"order_no":"KOM2"}',
    "cnote twice": SENT + b',"cnote":"A","cnote":"A"}',
    "status twice": SENT + b',"status":"Diterima"}',
    "status twice, once escaped": SENT + rb',"st\u0061tus":"Diterima"}',
    "NaN": SENT + b',"n":NaN}',
    "Infinity": SENT + b',"n":Infinity}',
    "minus Infinity": SENT + b',"n":-Infinity}',
    "60,000 lists": b"[" * 60_000,
    "60,000 lists in an object": SENT + b',"x":' + b"[" * 60_000,
    "32,000 lists, closed again": SENT + b',"x":' + b"[" * 32_000 + b"]" * 32_000 + b"}",
    "10,000 objects, closed again": b'{"x":' * 10_000 + b"1" + b"}" * 10_000,
    "null": b"null",
    "a number": b"5",
    "a string": b'"x"',
    "an empty list": b"[]",
    "a list of reports": b"[" + DOCUMENTED + b"]",
    "an empty object": b"{}",
    "an empty body": b"",
    "trailing junk": DOCUMENTED + b"x",
    "two documents": DOCUMENTED + b"\n" + DOCUMENTED,
    "a comment": b"/* */" + DOCUMENTED,
    "a comment at the end": DOCUMENTED + b" // x",
    "single quotes": DOCUMENTED.replace(b'"', b"'"),
    "a form": b"order_no=KOM1&cnote=AWB1&status=Dikirim",
    "parts": b'--x\r\nContent-Disposition: form-data; name="status"\r\n\r\nDikirim\r\n--x--',
}

# Bodies of the largest allowed size whose content is expensive to parse.
LARGE: Final = {
    "keys": SENT + b"".join(b',"k%d":1' % n for n in range(5_500)) + b"}",
    "empty keys": filled(SENT, b',"":1', b"}"),
    "escaped keys": SENT + b"".join(rb',"\u006b%d":1' % n for n in range(4_200)) + b"}",
    "backslashes": filled(SENT + b',"x":"', rb"\\", b'"}'),
    "backslashes alone": filled(b'"', b"\\", b'"'),
    "brackets": b"[" * BODY_BYTES_MAX,
    "brackets behind an escape": filled(SENT + rb',"\n":', b"[", b"}"),
}

# The Content-Encoding and the body.
WELL_CODED: Final = {
    "gzip": ("gzip", gzip.compress(DOCUMENTED)),
    "upper case": ("GZIP", gzip.compress(DOCUMENTED)),
    "gzip of two members": ("gzip", gzip.compress(DOCUMENTED[:20]) + gzip.compress(DOCUMENTED[20:])),
    "identity": ("identity", DOCUMENTED),
}

# The expected status, the body, and its Content-Encoding lines.
BADLY_CODED: Final = {
    "not compressed": (400, DOCUMENTED, ["gzip"]),
    "cut short": (400, gzip.compress(DOCUMENTED)[:-12], ["gzip"]),
    "cut before its checksum": (400, gzip.compress(DOCUMENTED)[:-8], ["gzip"]),
    "a wrong checksum": (400, gzip.compress(DOCUMENTED)[:-8] + b"\0" * 8, ["gzip"]),
    "junk behind it": (400, gzip.compress(DOCUMENTED) + b"junk", ["gzip"]),
    "a bomb": (413, gzip.compress(b" " * 20_000_000), ["gzip"]),
    "just too large": (413, gzip.compress(DOCUMENTED + b" " * BODY_BYTES_MAX), ["gzip"]),
    "brotli": (415, DOCUMENTED, ["br"]),
    "zstd": (415, DOCUMENTED, ["zstd"]),
    "deflate": (415, DOCUMENTED, ["deflate"]),
    "an invented one": (415, DOCUMENTED, ["no-such"]),
    "gzip twice": (415, gzip.compress(gzip.compress(DOCUMENTED)), ["gzip, gzip"]),
    "another in a second line": (415, gzip.compress(DOCUMENTED), ["gzip", "br"]),
}

LENGTH: Final = b"Content-Length: %d" % len(SMUGGLED)
CHUNKED: Final = b"Transfer-Encoding: chunked"
GZIP: Final = b"Transfer-Encoding: gzip"
_N: Final = len(SMUGGLED)
# Malformed messages, and messages whose end two HTTP parsers could see in different places.
BADLY_FRAMED: Final = {
    "length and chunked": head(LENGTH, CHUNKED) + chunked(SMUGGLED),
    "chunked and length": head(CHUNKED, LENGTH) + chunked(SMUGGLED),
    "chunked and no length": head(CHUNKED, b"Content-Length: 0") + chunked(SMUGGLED),
    "two lengths": head(b"Content-Length: 2", LENGTH) + SMUGGLED,
    "a length twice": head(LENGTH, LENGTH) + SMUGGLED,
    "a list of lengths": head(LENGTH + b", %d" % _N) + SMUGGLED,
    "a plus sign": head(b"Content-Length: +%d" % _N) + SMUGGLED,
    "+2": head(b"Content-Length: +2") + b"{}",
    "-2": head(b"Content-Length: -2") + SMUGGLED,
    "hexadecimal": head(b"Content-Length: 0x10") + SMUGGLED,
    "an underscore": head(b"Content-Length: 1_0") + SMUGGLED,
    "40 digits": head(b"Content-Length: " + b"9" * 40) + SMUGGLED,
    "an empty length": head(b"Content-Length:") + SMUGGLED,
    "a space before the colon": head(LENGTH.replace(b":", b" :")) + SMUGGLED,
    "a folded line": head(b"X: a\r\n b", LENGTH) + SMUGGLED,
    "bare LF throughout": head(LENGTH).replace(b"\r\n", b"\n") + SMUGGLED,
    "bare LF after a header": head(b"X: a\n" + LENGTH) + SMUGGLED,
    "bare LF after the head": head(LENGTH)[:-2] + b"\n" + SMUGGLED,
    "LF after a size": head(CHUNKED) + b"%x\n%s\r\n0\r\n\r\n" % (_N, SMUGGLED),
    "LF after a chunk": head(CHUNKED) + b"%x\r\n%s\n0\n\n" % (_N, SMUGGLED),
    "a size with 0x": head(CHUNKED) + b"0x2\r\n{}\r\n0\r\n\r\n",
    "a negative size": head(CHUNKED) + b"-2\r\n{}\r\n0\r\n\r\n",
    "gzip, chunked": head(b"Transfer-Encoding: gzip, chunked") + chunked(SMUGGLED),
    "chunked, gzip": head(b"Transfer-Encoding: chunked, gzip") + chunked(SMUGGLED),
    "gzip, then chunked": head(GZIP, CHUNKED) + chunked(SMUGGLED),
    "chunked, then gzip": head(CHUNKED, GZIP) + chunked(SMUGGLED),
    "chunked twice": head(CHUNKED, CHUNKED) + chunked(SMUGGLED),
    "identity": head(b"Transfer-Encoding: identity") + SMUGGLED,
    "xchunked": head(b"Transfer-Encoding: xchunked") + chunked(SMUGGLED),
    "a vertical tab": head(b"Transfer-Encoding: \x0bchunked") + chunked(SMUGGLED),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 100,
    "NULs": b"\0" * 100,
}

# Heads that are longer than any server accepts.
ENDLESS: Final = {
    "a header": head(b"X: " + b"x" * 1_000_000)[:-4],
    "many headers": head(*[b"X: x"] * 100_000)[:-2],
    "a path": b"PUT /" + b"x" * 1_000_000,
    "a method": b"P" * 1_000_000,
}

# The bytes that are sent at once, the bytes that follow one by one, and the acceptable lists of statuses.
SLOW: Final[dict[str, tuple[bytes, bytes, list[list[int]]]]] = {
    "a head": (head()[:-2] + b"X: ", b"x", [[], [408]]),
    "a body": (head(b"Content-Length: 500"), b" ", [[], [408]]),
    "a head after an answer": (request("GET", "/livez") + b"PUT", b" ", [[200], [200, 408]]),
    "a body in chunks": (head(CHUNKED), b"1\r\n \r\n", [[], [408]]),
    "many headers": (head()[:-2], b"X:x\r\n", [[], [408]]),
    "a compressed body": (
        head(b"Content-Length: 500", b"Content-Encoding: gzip"),
        gzip.compress(DOCUMENTED),
        [[], [408]],
    ),
    "empty lines": (b"", b"\r\n", [[], [408]]),
    "a body that nobody reads": (head(b"Content-Length: 500", method=b"GET"), b" ", [[405]]),
}
SILENT: Final[tuple[bytes, bytes, list[list[int]]]] = (b"", b"", [[], [408]])

# Strategies for arbitrary bodies.
ANYTHING: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS: Final = st.sampled_from(
    ["order_no", "status", "cnote", "timestamp", r"st\u0061tus", "", "__proto__", r"\n"]
)
VALUES: Final = st.one_of(ANYTHING, st.text(min_size=1, max_size=140), st.sampled_from(["KOM1", "Dikirim"]))


@st.composite
def reports(draw: st.DrawFn) -> bytes:
    """Valid reports with unusual text, any cnote and any further fields."""
    text = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=20)
    keys = st.text(max_size=5).filter(lambda key: key not in ("order_no", "status"))
    fields = draw(st.dictionaries(keys | st.just("cnote"), VALUES, max_size=4))
    fields |= {"order_no": draw(text | st.integers(0, 10**18 - 1)), "status": draw(text)}
    return json.dumps(fields, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    """JSON-like objects whose known keys may be doubled, escaped or missing, with any values."""
    pairs = draw(st.lists(st.tuples(KEYS, VALUES), max_size=5))
    ascii_only = draw(st.booleans())
    members = (f'"{key}":{json.dumps(value, ensure_ascii=ascii_only)}' for key, value in pairs)
    raw = f"{{{','.join(members)}}}".encode("utf-8", "surrogatepass")
    return BYTE_ORDER_MARK + raw if draw(st.booleans()) else raw


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """The documented body with some of its bytes replaced, removed, doubled or inserted."""
    raw = DOCUMENTED
    for _ in range(draw(st.integers(1, 3))):
        start, end = sorted((draw(st.integers(0, len(raw))), draw(st.integers(0, len(raw)))))
        middle = draw(st.sampled_from([b"", raw[start:end] * 2]) | st.binary(min_size=1, max_size=4))
        raw = raw[:start] + middle + raw[end if draw(st.booleans()) else start :]
    return raw


@st.composite
def nests(draw: st.DrawFn) -> bytes:
    """Valid reports with a deeply nested member, closed or not."""
    opening, closing = draw(st.sampled_from([(b"[", b"]"), (b'{"":', b"}"), (b'{"status":', b"}")]))
    depth = draw(st.integers(1, 3_000))
    tail = b"1" + closing * (depth + draw(st.integers(-1, 1))) + b"}"
    return SENT + draw(st.sampled_from([b',"x":', rb',"\n":'])) + opening * depth + tail


BODIES: Final = st.one_of(reports(), reports(), objects(), mutants(), nests(), st.binary(max_size=200))


# Paths that only path resolution would turn into the webhook's path, or away from it.
BESIDE_THE_WEBHOOK: Final = (
    "//webhook", "/webhook//", "/webhook/../x", "/x/../webhook", "/./webhook",
    "/webhook/.", "/webhook/%2e", "/webhook/%2e%2e/x", "/x/%2e%2e/webhook", "/%2e/webhook",
    "/%2E%2E/webhook", "/%2fwebhook", "/webhook%2f", "/webhook%00", "/webhook;x=1",
    "/WEBHOOK",
)  # fmt: skip

# Paths, each with its invalid parameter.
BAD_PARAMETERS: Final = [
    *(
        (f"{path}?limit={limit}", "limit")
        for path in (
            "/orders",
            "/orders/KOM1/timeline",
            "/orders/KOM1/events",
            "/events",
            "/audit/transitions",
            "/quarantine",
        )
        for limit in ("0", "-1", "1000000000", "x", "", "1.5", "1e1", "%D9%A3", "9" * 5_000)
    ),
    *(
        (f"{path}?cursor={cursor}", "cursor")
        for path in ("/orders", "/orders/KOM1/timeline", "/audit/transitions", "/quarantine")
        for cursor in ("x", "LTE", "%25", "%00", "%FF", "MQ==", "%C3%A9", "OTIyMzM3MjAzNjg1NDc3NTgwOA")
    ),
    *(
        (f"/orders/KOM1?as_of={time}", "as_of")
        for time in ("yesterday", "", "0", "2026-01-01T00:00:00", "9999-12-31T23:59:59-07:00", "%00")
    ),
    *((f"/audit/transitions?verdict={verdict}", "verdict") for verdict in ("postponed", "", "%00")),
    *((f"/audit/transitions?{name}=nowhere", name) for name in ("from", "to")),
    *((f"/orders?status={status}", "status") for status in ("sent", "", "in_transit'--", "%FF")),
]


class Answer(NamedTuple):
    """A parsed response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def split_answer(raw: bytes) -> tuple[Answer, bytes] | None:
    """Split bytes into the first response and the rest; return None if the response is incomplete."""
    head, end, rest = raw.partition(b"\r\n\r\n")
    if not end:
        return None
    status_line, *lines = head.split(b"\r\n")
    found = _STATUS_LINE.fullmatch(status_line)
    assert found is not None, status_line
    fields = (line.decode("latin-1").partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in fields}
    length = 0 if found[1] == b"304" else int(headers["content-length"])
    if len(rest) < length:
        return None
    return owed(Answer(int(found[1]), headers, rest[:length]), head), rest[length:]


def split_answers(raw: bytes) -> list[Answer]:
    """Split bytes into responses. The last one must be complete."""
    answers = []
    while raw:
        split = split_answer(raw)
        assert split is not None, raw
        answer, raw = split
        answers.append(answer)
    return answers


def owed(answer: Answer, head: bytes) -> Answer:
    """Check the requirements that every response must meet, and return the response."""
    assert answer.status != 500, answer
    assert answer.headers["server"] == "order-tracking"
    assert _INSIDE.search(head + answer.body) is None, answer
    if answer.status >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json["status"] == answer.status
        assert answer.json["title"]
    elif answer.status != 304:
        assert answer.headers["content-type"] == "application/json"
    return answer


class Wire:
    """Raw connections to a running service."""

    def __init__(self, service: RunningService) -> None:
        self.service = service
        self.port = int(service.url.rsplit(":", 1)[1])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_SECONDS)

    def exchange(self, raw: bytes) -> Answer:
        """Send bytes, and return the first response."""
        with self.connect() as connection:
            # The service may refuse a request and close the connection before all of it is sent.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(raw)
            received = b""
            while (split := split_answer(received)) is None:
                received += (piece := connection.recv(65_536))
                assert piece, received
            return split[0]

    def talk(self, raw: bytes) -> list[Answer]:
        """Send bytes, and return every response after the service has closed the connection."""
        received = b""
        with self.connect() as connection:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(raw)
            with suppress(ConnectionResetError):
                while piece := connection.recv(65_536):
                    received += piece
        return split_answers(received)

    def put(self, body: bytes, *headers: str) -> Answer:
        return self.exchange(request("PUT", "/webhook", body, *headers))

    def get(self, path: str, *headers: str) -> Answer:
        return self.exchange(request("GET", path, b"", *headers))

    def read(self, path: str) -> Any:
        """Read a path, and return its parsed JSON."""
        answer = self.get(path)
        assert answer.status == 200, answer
        return answer.json

    def state(self) -> tuple[int, Any]:
        """Return the head of the log and the newest quarantine entry, which no refused request may change."""
        return self.read("/projections")["head"], self.read("/quarantine?limit=1")

    def recorded(self, body: bytes, *headers: str) -> tuple[Any, Any]:
        """Send a body, check that its event contains it, and return the receipt and the event's fields."""
        return self.seen_recorded(body, self.put(body, *headers))

    def seen_recorded(self, body: bytes, answer: Answer) -> tuple[Any, Any]:
        """Check that a body with this response has an event, and return the receipt and the event's fields."""
        assert answer.status == 200, answer
        receipt = answer.json
        assert receipt["outcome"] in VERDICTS, receipt
        after = f"after_version={receipt['version'] - 1}&limit=1"
        (event,) = self.read(f"/orders/{quote(receipt['order_no'], safe='')}/events?{after}")["events"]
        assert event["position"] == receipt["position"]
        assert event["data"]["report_id"] == receipt["report_id"]
        assert event["data"]["reported_status"] == receipt["reported_status"]
        assert event["data"]["body"].encode() == body.removeprefix(BYTE_ORDER_MARK)
        return receipt, event["data"]

    def quarantined(self, body: bytes, *headers: str) -> Any:
        """Send a body, check that it is in the quarantine and not in the log, and return the receipt."""
        head, _ = self.state()
        receipt = self.seen_quarantined(body, self.put(body, *headers))
        assert self.state()[0] == head
        return receipt

    def seen_quarantined(self, body: bytes, answer: Answer) -> Any:
        """Check that the quarantine has a body with this response unchanged, and return the receipt."""
        assert answer.status == 200, answer
        receipt = answer.json
        assert receipt["outcome"] == "quarantined", receipt
        assert receipt["reason"]
        assert [receipt[name] for name in ("version", "position", "status", "reported_status")] == [None] * 4
        entry = self.read(f"/quarantine/{receipt['quarantine_id']}")
        assert b64decode(entry["body_base64"]) == body
        return receipt
