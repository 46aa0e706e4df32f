"""The sender's account: the reports that were sent, compared with the events that the service recorded.

Every report has its own body, which is sent again unchanged until the response is 200. An attempt can arrive
although its response does not, so a report may be recorded several times; the service rightly judges all but
the first of these events as repeats. Therefore:

- *lost*: a 200 whose receipt does not match a recorded event (body, position, version, order and verdict), or
  matches one that another 200 has matched already, or is not a receipt at all.
- *doubled*: each event of a report beyond the number of its attempts, not counting those whose connection was
  refused; and each further event with the same ``report_id``.
- *altered*: an event of one of the run's orders with a body that was never sent.
- *given up*: a report of which no attempt was acknowledged; it may still be in the log.
"""

from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import aiohttp
import orjson

from service.http.responses import LOG_HEADER

PAGE_EVENTS: Final = 1_000
DETAILS_MAX: Final = 5
RECEIPT_BYTES_SHOWN_MAX: Final = 300
OK: Final = 200
GONE: Final = 410
READ_SECONDS_MAX: Final = 10.0


class UnreadableLogError(Exception):
    """The service's log cannot be read over HTTP. ``str()`` is one line."""


@dataclass
class Delivery:
    """The attempts to deliver one report, including its copies, and the receipts of those answered with 200."""

    attempts: int = 0
    receipts: list[bytes] = field(default_factory=list)
    is_given_up: bool = False


class RecordedEvent(NamedTuple):
    """The fields of an event that a receipt also has, and the body."""

    report_id: str
    order_no: str
    version: int
    position: int
    verdict: str
    body: str


class Account(NamedTuple):
    """The numbers of reports and events, and one line for each lost, doubled or altered one."""

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
        """Whether every report was acknowledged, and none is lost, doubled or altered."""
        return not (self.lost or self.doubled or self.altered or self.given_up)

    def lines(self, withheld: int = 0) -> Iterable[str]:
        """Yield the account as it is printed, with up to DETAILS_MAX details of each kind.

        ``withheld`` is the number of reports that were not meant to be sent.
        """
        verdicts = ", ".join(f"{count:,} {verdict}" for verdict, count in sorted(self.verdicts.items()))
        yield f"sent          {self.reports:>9,}  reports, in {self.attempts:,} attempts"
        yield f"acknowledged  {self.acknowledged:>9,}  attempts answered 200"
        yield f"recorded      {sum(self.verdicts.values()):>9,}  events{f': {verdicts}' if verdicts else ''}"
        for name, details in (("lost", self.lost), ("doubled", self.doubled), ("altered", self.altered)):
            yield f"{name:<12}  {len(details):>9,}"
            yield from (f"  {detail}" for detail in details[:DETAILS_MAX])
        yield f"given up      {self.given_up:>9,}"
        if withheld:
            yield f"never sent    {withheld:>9,}"
        yield "the account agrees" if self.agrees else "THE ACCOUNT DISAGREES"


def compare(deliveries: dict[str, Delivery], events: Iterable[RecordedEvent], prefix: str) -> Account:
    """Compare the reports that were sent with the log.

    Args:
        deliveries: the deliveries, by body.
        events: the log since the run began. Events of other orders are ignored.
        prefix: the beginning of the run's order numbers.
    """
    bodies, verdicts = Counter[str](), Counter[str]()
    by_id: dict[str, RecordedEvent] = {}
    lost, doubled, altered = [], [], []
    for event in events:
        if not event.order_no.startswith(prefix):
            continue
        bodies[event.body] += 1
        verdicts[event.verdict] += 1
        if event.body not in deliveries:
            altered.append(f"position {event.position}: {event.body!r}")
        if event.report_id in by_id:
            doubled.append(f"position {event.position}: another event with report_id {event.report_id}")
        by_id[event.report_id] = event
    for body, delivery in deliveries.items():
        doubled += [f"more events than attempts: {body}"] * max(0, bodies[body] - delivery.attempts)
        for receipt in delivery.receipts:
            acknowledged = _read_receipt(receipt, body)
            # Each event acknowledges one attempt.
            if acknowledged is None or by_id.pop(acknowledged.report_id, None) != acknowledged:
                lost.append(f"{body}, acknowledged by {receipt[:RECEIPT_BYTES_SHOWN_MAX]!r}")
    return Account(
        reports=len(deliveries),
        attempts=sum(delivery.attempts for delivery in deliveries.values()),
        acknowledged=sum(len(delivery.receipts) for delivery in deliveries.values()),
        given_up=sum(delivery.is_given_up for delivery in deliveries.values()),
        verdicts=dict(verdicts),
        lost=lost,
        doubled=doubled,
        altered=altered,
    )


def _read_receipt(receipt: bytes, body: str) -> RecordedEvent | None:
    """Return the event that a receipt describes, None if it is not a receipt."""
    try:
        fields = orjson.loads(receipt)
        place = (fields["order_no"], fields["version"], fields["position"])
        return RecordedEvent(str(fields["report_id"]), *place, fields["outcome"], body)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None


@dataclass
class ServiceLog:
    """The log of a service, read over HTTP.

    Each method raises UnreadableLogError if the service does not respond as expected within READ_SECONDS_MAX.

    Attributes:
        session: the HTTP client.
        base: the service's URL, without a slash at its end.
        key: an API key; empty for none.
        log_id: the id of the log at the first response; empty before it. Positions belong to this log.
    """

    session: aiohttp.ClientSession
    base: str
    key: str
    log_id: str = ""

    async def head(self) -> int:
        """Return the log's last position."""
        return int((await self._get("/projections"))["head"])

    async def events(self, after: int) -> AsyncIterator[RecordedEvent]:
        """Yield the events above a position, oldest first."""
        # The log may have been replaced since the position was read. Each ``next`` has the id too.
        log = f"&log={self.log_id}" if self.log_id else ""
        page = await self._get(f"/events?after={after}&limit={PAGE_EVENTS}{log}")
        while page["events"]:
            for event in page["events"]:
                data = event["data"]
                if data.get("rejudges") is not None:
                    # An operator has judged a report again; nothing was sent.
                    continue
                if data["body"] is None:
                    problem = "hides the bodies from that key: pass one of the scope read:bodies with --key"
                    raise UnreadableLogError(f"{self.base} {problem}")
                place = (event["order_no"], event["version"], event["position"])
                yield RecordedEvent(data["report_id"], *place, data["verdict"], data["body"])
            page = await self._get(page["next"])

    async def _get(self, path: str) -> dict[str, Any]:
        url = self.base + path
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = aiohttp.ClientTimeout(total=READ_SECONDS_MAX)
        try:
            async with self.session.get(
                url, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                page = orjson.loads(await response.read())
        except orjson.JSONDecodeError:
            page = None
        except (aiohttp.ClientError, OSError) as error:
            cause = error or f"no response within {READ_SECONDS_MAX:g} s"
            raise UnreadableLogError(f"cannot read the log of {self.base}: {cause}") from None
        self.log_id = self.log_id or response.headers.get(LOG_HEADER, "")
        if response.status == GONE and isinstance(page, dict):
            problem = "the database has lost events, or was restored, since the positions were read"
            raise UnreadableLogError(f"{problem} ({page.get('detail')}): begin again")
        if response.status in (401, 403):
            problem = "rejects that API key" if self.key else "requires an API key"
            raise UnreadableLogError(f"{self.base} {problem}: pass one of the scope read:bodies with --key")
        if response.status != OK or not isinstance(page, dict):
            problem = f"{url.partition('?')[0]} returned {response.status}, not the log"
            raise UnreadableLogError(f"{problem}: check the URL that is read, or set it with --read")
        return page
