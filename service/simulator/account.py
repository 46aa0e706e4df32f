"""The sender's account: what was sent, against what the service says that it recorded.

Every report's body is a text of its own, sent again byte for byte until the answer is 200. One report may so
be recorded several times, once for each attempt that arrived though its answer did not: the service judges all
but the first of them as repeats, and that is right. Hence:

- *lost*: a 200 whose receipt names no recorded event with this very body, position, version, order and verdict,
  or one that another 200 named already, or that holds no receipt at all.
- *doubled*: the events of a report beyond the attempts that could have reached the service: all of them, but
  those that found nobody listening. And events beyond the first with one and the same ``report_id``.
- *altered*: an event of one of the run's orders with a body that was never sent.
- *given up*: a report that was not acknowledged by any of its attempts; it may be recorded or not.
"""

from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import aiohttp
import orjson

PAGE_EVENTS: Final = 1_000
SHOWN_MAX: Final = 5
RECEIPT_BYTES_SHOWN_MAX: Final = 300
OK: Final = 200
READ_SECONDS_MAX: Final = 10.0


class UnreadableAccountError(Exception):
    """The service does not say what it recorded. ``str()`` is one line."""


@dataclass
class Sent:
    """What became of one report, the copies that were sent of it included."""

    attempts: int = 0
    receipts: list[bytes] = field(default_factory=list)
    is_given_up: bool = False


class Recorded(NamedTuple):
    """An event, as far as an account needs it."""

    report_id: str
    order_no: str
    version: int
    position: int
    verdict: str
    body: str


class Account(NamedTuple):
    """What was sent and what is recorded, in numbers, and the first of each thing that is wrong."""

    reports: int
    attempts: int
    acknowledged: int
    given_up: int
    verdicts: dict[str, int]
    lost: list[str]
    doubled: list[str]
    altered: list[str]

    @property
    def agrees(self) -> bool:
        """Whether nothing is lost, doubled, altered or left unacknowledged."""
        return not (self.lost or self.doubled or self.altered or self.given_up)

    def lines(self) -> Iterable[str]:
        """Yield the account as it is printed."""
        verdicts = ", ".join(f"{count:,} {verdict}" for verdict, count in sorted(self.verdicts.items()))
        yield f"sent          {self.reports:>9,}  reports, in {self.attempts:,} attempts"
        yield f"acknowledged  {self.acknowledged:>9,}  attempts answered 200"
        yield f"recorded      {sum(self.verdicts.values()):>9,}  events{f': {verdicts}' if verdicts else ''}"
        for name, wrong in (("lost", self.lost), ("doubled", self.doubled), ("altered", self.altered)):
            yield f"{name:<12}  {len(wrong):>9,}"
            for one in wrong[:SHOWN_MAX]:
                yield f"  {one}"
        yield f"given up      {self.given_up:>9,}"


def compare(sent: dict[str, Sent], events: Iterable[Recorded], prefix: str) -> Account:
    """Hold what was sent against the log.

    Args:
        sent: by body.
        events: the log, or its part since the run began; others' may be among them.
        prefix: of the run's order numbers.
    """
    recorded: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    by_id: dict[str, Recorded] = {}
    doubled, altered = [], []
    for event in events:
        if not event.order_no.startswith(prefix):
            continue
        recorded[event.body] += 1
        verdicts[event.verdict] += 1
        if event.body not in sent:
            altered.append(f"position {event.position}: {event.body!r}")
        if event.report_id in by_id:
            doubled.append(f"position {event.position}: another event with report_id {event.report_id}")
        by_id[event.report_id] = event
    lost = []
    for body, one in sent.items():
        doubled += [f"more events than attempts: {body}"] * max(0, recorded[body] - one.attempts)
        for receipt in one.receipts:
            said = _read_receipt(receipt, body)
            # Each event acknowledges one attempt.
            if said is None or by_id.pop(said.report_id, None) != said:
                lost.append(f"{body}, answered {receipt[:RECEIPT_BYTES_SHOWN_MAX]!r}")
    numbers = (
        len(sent),
        sum(one.attempts for one in sent.values()),
        sum(len(one.receipts) for one in sent.values()),
        sum(one.is_given_up for one in sent.values()),
    )
    return Account(*numbers, dict(verdicts), lost, doubled, altered)


def _read_receipt(receipt: bytes, body: str) -> Recorded | None:
    """Return the event that a receipt speaks of, None where it is no receipt."""
    try:
        said = orjson.loads(receipt)
        place = (said["order_no"], said["version"], said["position"])
        return Recorded(str(said["report_id"]), *place, said["outcome"], body)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None


class ServiceLog:
    """The service's read API, from outside.

    Args:
        session: to ask with.
        base: where it is, without a slash at its end.
        key: sent along where there is one.
    """

    def __init__(self, session: aiohttp.ClientSession, base: str, key: str) -> None:
        self._session = session
        self._base = base
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def head(self) -> int:
        """Return the log's last position.

        Raises:
            UnreadableAccountError: the service does not say.
        """
        return int((await self._get("/projections"))["head"])

    async def events(self, after: int) -> AsyncIterator[Recorded]:
        """Yield what was recorded behind a position, page by page.

        Raises:
            UnreadableAccountError: the service does not say.
        """
        path: str | None = f"/events?after={after}&limit={PAGE_EVENTS}"
        while path is not None:
            page = await self._get(path)
            for event in page["events"]:
                data = event["data"]
                place = (event["order_no"], event["version"], event["position"])
                yield Recorded(data["report_id"], *place, data["verdict"], data["body"])
            path = page["next"]

    async def _get(self, path: str) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=READ_SECONDS_MAX)
        try:
            async with self._session.get(
                self._base + path, headers=self._headers, timeout=timeout, allow_redirects=False
            ) as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise UnreadableAccountError(f"{self._base} cannot be read: {error or 'no answer'}") from None
        if response.status in (401, 403):
            said = "does not take that key" if self._headers else "wants a key"
            raise UnreadableAccountError(f"{self._base} {said}: give one of the scope read with --key")
        try:
            page = orjson.loads(body)
        except orjson.JSONDecodeError:
            page = None
        if response.status != OK or not isinstance(page, dict):
            what = path.partition("?")[0]
            raise UnreadableAccountError(f"{self._base} answers {response.status} to GET {what}")
        return page
