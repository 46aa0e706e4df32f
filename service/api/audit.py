"""The audit over HTTP: every verdict on every report, and the rules behind them."""

from collections.abc import Iterator
from operator import itemgetter

from aiohttp import web
from pydantic import Field
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.statuses import HAPPY_PATH, LABELS, SETTLED, STATUSES, Label, Status
from domain.transitions import TABLE, Leg, Verdict, judge
from projections import audit, timeline
from projections.audit import Transition, TransitionsFilter
from projections.windows import POSITION_MAX
from service.api.freshness import wait_for
from service.database.connections import ConnectionPool
from service.database.operations import Action, Operation, operations_page
from service.http.endpoints import CSV, Endpoint, Tag
from service.http.pagination import Page, csv_response, cut_page, list_response
from service.http.parameters import PageQuery, Query, TableQuery, Text, Time
from service.http.responses import json_response
from service.projecting.position import ViewPositions
from service.vocabulary import VocabularyFile


class TransitionPage(TypedDict):
    """A page of the audit."""

    transitions: list[Transition]
    next: str | None


class StatusRule(TypedDict):
    """A status of the vocabulary and the sender's words for it."""

    status: Status
    label: Label
    aliases: list[str]
    settled: bool
    rank: int | None


class CellRule(TypedDict):
    """A cell of the transition table: the verdict on a report, and the stages that it skips."""

    verdict: Verdict
    skipped: list[Status]


# "from" is a keyword of Python.
RowRule = TypedDict("RowRule", {"from": Status | None, "leg": Leg | None, "to": dict[str, CellRule]})
RowRule.__doc__ = "A row of the transition table: the verdicts on every report about an order in this status."


class OwnWords(TypedDict):
    """The words of the operator's vocabulary file, normalised, and the file's SHA-256 in hex."""

    words: dict[str, Status]
    sha256: str


class Rules(TypedDict):
    """The vocabulary and the transition table.

    ``aliases`` of the statuses include the words of the vocabulary file, which is null if there is none.
    """

    statuses: list[StatusRule]
    table: list[RowRule]
    vocabulary_file: OwnWords | None


class TransitionsQuery(TableQuery):
    """The filters of the audit."""

    verdict: Verdict | None = Field(default=None, description="reports of this verdict")
    order_no: Text | None = Field(default=None, description="reports about this order")
    from_: Status | None = Field(default=None, alias="from", description="the order's status before the report")
    to: Status | None = Field(default=None, description="the reported status")
    since: Time | None = Field(default=None, description="the report arrived at or after this time")
    until: Time | None = Field(default=None, description="the report arrived before this time")


class OperationPage(TypedDict):
    """A page of operators' actions."""

    operations: list[Operation]
    next: str | None


class OperationsQuery(PageQuery):
    """The filter of operators' actions."""

    action: Action | None = Field(default=None, description="actions of this kind")


def _rows() -> Iterator[RowRule]:
    for status, leg in TABLE:
        row: dict[str, CellRule] = {}
        for reported in STATUSES:
            judgement = judge(status, leg, reported)
            row[reported] = {"verdict": judgement.verdict, "skipped": [*judgement.skipped]}
        yield {"from": status, "leg": leg, "to": row}


def make_rules(vocabulary: VocabularyFile) -> Rules:
    """Return the rules by which reports are judged with a vocabulary."""
    words = vocabulary.vocabulary
    own = None if vocabulary.sha256 is None else OwnWords(words=words.own_words, sha256=vocabulary.sha256)
    return {
        "statuses": [
            {
                "status": status,
                "label": LABELS[status],
                "aliases": words.words(status),
                "settled": status in SETTLED,
                "rank": HAPPY_PATH.index(status) if status in HAPPY_PATH else None,
            }
            for status in STATUSES
        ],
        "table": [*_rows()],
        "vocabulary_file": own,
    }


class AuditApi:
    """Serves the audit.

    Args:
        pool: the connections to read with.
        positions: how far each view has come.
        vocabulary: the vocabulary.
    """

    tag = Tag("audit", "Every verdict with its reason, operators' actions, and the transition table.")

    def __init__(self, pool: ConnectionPool, positions: ViewPositions, vocabulary: VocabularyFile) -> None:
        self._pool = pool
        self._positions = positions
        self._rules = make_rules(vocabulary)

    @Endpoint("GET", "/audit/transitions", TransitionPage, query=TransitionsQuery)
    async def list_transitions(self, request: web.Request, query: TransitionsQuery) -> web.Response:
        """List every verdict on every report, in the order of the log."""
        return list_response(query, "transitions", await self._transitions(query), request.path)

    @Endpoint("GET", "/audit/transitions.csv", str, query=TransitionsQuery, media=CSV)
    async def export_transitions(self, _request: web.Request, query: TransitionsQuery) -> web.Response:
        """List every verdict on every report as CSV, in the order of the log."""
        return csv_response(
            query, "transitions", await self._transitions(query), "/audit/transitions.csv", Transition
        )

    @Endpoint("GET", "/audit/operations", OperationPage, query=OperationsQuery, scope="admin")
    async def list_operations(self, request: web.Request, query: OperationsQuery) -> web.Response:
        """List operators' actions, newest first: who did what, when and why."""
        return list_response(query, "operations", await self._operations(query), request.path)

    @Endpoint("GET", "/audit/operations.csv", str, query=OperationsQuery, scope="admin", media=CSV)
    async def export_operations(self, _request: web.Request, query: OperationsQuery) -> web.Response:
        """List operators' actions as CSV, newest first."""
        return csv_response(
            query, "operations", await self._operations(query), "/audit/operations.csv", Operation
        )

    @Endpoint("GET", "/transitions", Rules)
    async def get_rules(self, _request: web.Request, _query: Query) -> web.Response:
        """Get the status words and the transition table."""
        return json_response(self._rules)

    async def _transitions(self, query: TransitionsQuery) -> Page:
        await wait_for(self._positions, query.after_position, timeline.VIEW.name)
        filters = TransitionsFilter(
            query.verdict, query.order_no, query.from_, query.to, query.since, query.until
        )
        async with self._pool.connection() as connection:
            window = await audit.transitions_page(connection, query.cursor or 0, filters, query.limit + 1)
        return cut_page(window.rows, query.limit, itemgetter("position"), window.reached)

    async def _operations(self, query: OperationsQuery) -> Page:
        before = POSITION_MAX if query.cursor is None else query.cursor
        async with self._pool.connection() as connection:
            rows = await operations_page(connection, before, query.action, query.limit + 1)
        return cut_page(rows, query.limit, itemgetter("operation_id"))
