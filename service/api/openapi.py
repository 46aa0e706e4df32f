"""The OpenAPI document, made of what the endpoints declare, with examples that the code itself has made."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from itertools import groupby
from operator import itemgetter
from typing import Any, Final

import orjson
from aiohttp import hdrs, web
from pydantic import BaseModel, TypeAdapter

from domain.order import UNHEARD, Report, judge_report
from projections import current_status, statistics
from projections.timeline import Entry, Transition
from service.api import representations
from service.api.events import LAST_EVENT_ID
from service.event_log.store import RecordedEvent, encode_event
from service.http.endpoints import CSV, JSON, NDJSON, SSE, Endpoint, declared
from service.http.parameters import Query
from service.http.problems import Kind, answer
from service.ingest.idempotency import KEY_BYTES_MAX, KEY_HEADERS
from service.ingest.quarantine import QuarantineEntry
from service.ingest.recorder import Receipt
from service.version import VERSION

REFERENCE: Final = "#/components/schemas/{model}"
DESCRIPTION: Final = """
What was reported of orders, what was made of it, and why. Lists are paged by `next`; every error is a problem
by RFC 9457.
""".strip()
PROBLEM_MEDIA: Final = "application/problem+json"
RETRY_AFTER: Final = {"schema": {"type": "integer"}, "description": "in seconds"}
# Where a client may stop reading what it is told, it is told in words.
NOT_JSON: Final = {
    CSV: "The list as a table; the next page stands in the `Link` header.",
    NDJSON: "One event a line, up to the head of the log.",
    "text/plain": "In the text format of Prometheus.",
    SSE: "`event: status_reported`, its `id` the position, its `data` as in `GET /events`; comments between. "
    "With `brief`: `event: log_grown`, its `data` the position.",
}


class ReportBody(BaseModel):
    """What the sender sends; anything else in it is kept as well."""

    order_no: str | int
    status: str
    cnote: str | int | None = None
    timestamp: str | int | float | None = None


class OpenApi:
    """Serves the document.

    Args:
        apis: whose endpoints are documented.
        webhook_path: where reports are taken.
    """

    def __init__(self, apis: Iterable[object], webhook_path: str) -> None:
        endpoints = [endpoint for api in (*apis, self) for endpoint, _ in declared(api) if endpoint.is_listed]
        self.document = document(endpoints, webhook_path)

    @Endpoint("GET", "/openapi.json", dict, scope=None)
    async def show_document(self, _request: web.Request, _query: Query) -> web.Response:
        """This document."""
        return answer(self.document)


def document(endpoints: Iterable[Endpoint], webhook_path: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of some endpoints and the webhook."""
    every = [*_webhook_endpoints(webhook_path), *endpoints]
    schemas, references = _schemas(every)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in every:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, references)
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "Order tracking for Komerce",
            "version": VERSION,
            "description": DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "`otk_...`"}},
        },
    }


def _webhook_endpoints(path: str) -> Iterator[Endpoint]:
    problems = (Kind.BAD_SIGNATURE, Kind.FORBIDDEN, HTTPStatus.NOT_FOUND, Kind.UNAVAILABLE)
    for method in ("PUT", "POST"):
        yield Endpoint(
            method,
            path,
            representations.Receipt,
            query=None,
            scope=None,
            body=ReportBody,
            problems=problems,
            summary="Take a report; 200 means that it is committed.",
        )


def _schemas(endpoints: Iterable[Endpoint]) -> tuple[dict[str, Any], dict[Any, dict[str, Any]]]:
    """Return every schema by its name, and for each type the reference to its own."""
    kinds = {endpoint.answers for endpoint in endpoints} | {
        one.body for one in endpoints if one.body is not None
    }
    adapters = [(kind, "serialization", TypeAdapter(kind)) for kind in sorted(kinds, key=str)]
    by_kind, definitions = TypeAdapter.json_schemas(adapters, ref_template=REFERENCE)  # type: ignore[arg-type]
    schemas = dict(definitions["$defs"])
    schemas["Problem"] = {
        "type": "object",
        "description": "RFC 9457. Some have members of their own, such as `parameter`.",
        "properties": {
            "type": {"type": "string", "format": "uri-reference"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": ["string", "null"]},
        },
        "required": ["type", "title", "status", "detail"],
    }
    return schemas, {kind: schema for (kind, _), schema in by_kind.items()}


def _operation(endpoint: Endpoint, references: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{endpoint.method.lower()}{endpoint.path.title()}".translate(NO_NAME),
        "summary": endpoint.summary,
        "parameters": [
            *_path_parameters(endpoint.path),
            *_query_parameters(endpoint.query),
            *_header_parameters(endpoint),
        ],
        "responses": {
            "200": _success(endpoint, references[endpoint.answers]),
            **({"304": {"description": "It is as the client has it."}} if endpoint.has_etag else {}),
            **_failures(endpoint),
        },
    }
    if endpoint.body is not None:
        media: dict[str, Any] = {"schema": references[endpoint.body]}
        media["example"] = REPORT_BODY if endpoint.body is ReportBody else {"reason": "a test of ours"}
        operation["requestBody"] = {"required": True, "content": {JSON: media}}
    if endpoint.scope is not None:
        operation["security"] = [{"key": []}, {}]
        operation["description"] = f"Needs a key of the scope `{endpoint.scope}` where keys are on."
    return operation


NO_NAME: Final = str.maketrans("", "", "/{}._-")


def _path_parameters(path: str) -> Iterator[dict[str, Any]]:
    for part in path.split("/"):
        if part.startswith("{"):
            name = part.strip("{}")
            schema = (
                {"type": "integer", "minimum": 1}
                if name == "quarantine_id"
                else {"type": "string", "minLength": 1}
            )
            yield {"name": name, "in": "path", "required": True, "schema": schema}


def _query_parameters(query: type[Query] | None) -> Iterator[dict[str, Any]]:
    for name, found in (query or Query).model_json_schema().get("properties", {}).items():
        schema = {key: value for key, value in found.items() if key not in ("title", "description", "default")}
        if "anyOf" in schema:
            # What may be left out is null inside, and cannot be sent.
            (schema,) = [one for one in schema["anyOf"] if one != {"type": "null"}]
        if found.get("default") is not None:
            schema = {**schema, "default": found["default"]}
        parameter = {"name": name, "in": "query", "required": False, "schema": schema}
        if "description" in found:
            parameter["description"] = found["description"]
        yield parameter


def _header_parameters(endpoint: Endpoint) -> Iterator[dict[str, Any]]:
    text: dict[str, Any] = {"type": "string"}
    headers: list[tuple[str, dict[str, Any], str]] = []
    if endpoint.body is ReportBody:
        said = (
            f"A header: the same key and body for an order get the first receipt again; {KEY_BYTES_MAX} bytes."
        )
        headers += [(name, text, said) for name in KEY_HEADERS]
    if endpoint.has_etag:
        headers.append((str(hdrs.IF_NONE_MATCH), text, "A header: the `ETag` of what the client has."))
    if SSE in endpoint.media:
        position = {"type": "integer", "minimum": 0}
        headers.append((LAST_EVENT_ID, position, "A header: the last position that was seen; over `after`."))
    for name, schema, description in headers:
        yield {"name": name, "in": "header", "required": False, "schema": schema, "description": description}


def _success(endpoint: Endpoint, reference: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for media in endpoint.media:
        if media == JSON:
            content[media] = {"schema": reference}
            if (example := EXAMPLES.get(endpoint.answers)) is not None:
                content[media]["example"] = example
        else:
            content[media] = {"schema": {"type": "string", "description": NOT_JSON[media]}}
    return {"description": endpoint.answers.__doc__ or "The answer.", "content": content}


def _failures(endpoint: Endpoint) -> dict[str, Any]:
    failures: dict[str, Any] = {}
    told = sorted((_status(kind), _told(kind)) for kind in endpoint.all_problems)
    for status, kinds in groupby(told, key=itemgetter(0)):
        failures[str(status)] = {
            "description": " ".join(what for _, what in kinds),
            "headers": {"X-Request-Id": {"schema": {"type": "string"}, "description": "for the logs"}},
            "content": {PROBLEM_MEDIA: {"schema": {"$ref": REFERENCE.format(model="Problem")}}},
        }
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            failures[str(status)]["headers"]["Retry-After"] = RETRY_AFTER
    return failures


def _status(kind: Kind | HTTPStatus) -> int:
    return kind.status if isinstance(kind, Kind) else kind.value


def _told(kind: Kind | HTTPStatus) -> str:
    return f"[{kind.title}](/docs#{kind.slug}): {kind.meaning}" if isinstance(kind, Kind) else kind.phrase


# Examples: an order of two reports, taken through the code that would have recorded and shown it.

REPORT_BODY: Final = {"order_no": "KOM1", "cnote": "AWB1", "status": "Dikirim"}


def _examples() -> dict[Any, Any]:
    first_at = datetime(2026, 1, 31, 8, 30, tzinfo=UTC)
    standing, events = UNHEARD, []
    for number, status in enumerate(("Diajukan", "Dikirim"), 1):
        body = orjson.dumps({**REPORT_BODY, "status": status}).decode()
        report_id = f"7e2a5c10-9f3b-4d1e-8c55-0b6a4f3f2d0{number}"
        report = Report(report_id, "KOM1", status, "AWB1", body, remote="203.0.113.7")
        event = judge_report(standing, report, first_at + timedelta(hours=number))
        standing = event.standing
        events.append((number, event))
    rows: dict[str, current_status.Row] = {}
    current_status.fold(events, rows)
    order = representations.order(current_status.order_row(rows["KOM1"]))
    recorded = [
        RecordedEvent(
            position, "KOM1", event.originator_version, event.TOPIC, encode_event(event), event.timestamp
        )
        for position, event in events
    ]
    entries = [
        representations.entry(
            Entry(
                event.originator_version, event.verdict, event.status, event.previous_status, event.recognised,
                event.reported_status, event.reported_cnote, [*event.skipped], event.reason, event.timestamp,
                event.occurred_at, 0, None,
            )
        )
        for _, event in events
    ]  # fmt: skip
    transitions = [
        representations.transition(
            Transition(
                position, "KOM1", event.originator_version, event.verdict, event.previous_status,
                event.recognised, event.reported_status, event.reason, [*event.skipped], event.timestamp,
            )
        )
        for position, event in events
    ]  # fmt: skip
    position, last = events[-1]
    receipt = Receipt(
        last.verdict,
        last.report_id,
        "KOM1",
        2,
        position,
        last.status,
        last.reported_status,
        last.skipped,
        last.reason,
    )
    entry = representations.quarantine_entry(
        QuarantineEntry(
            1, first_at, "status is missing", "open", 2, first_at, "203.0.113.7", None, None, None, None
        )
    )
    counted = statistics.Statistics(
        position,
        [("in_transit", 1)],
        [statistics.Move("submitted", "in_transit", 1, (3_600.0, 3_600.0, 3_600.0))],
        [(first_at.date(), {"advanced": 2})],
        [("Antar Ulang", 1, first_at)],
    )
    view = {
        "view": "timeline",
        "position": 2,
        "head": 2,
        "lag_events": 0,
        "lag_seconds": 0.0,
        "is_outdated": False,
    }
    made = {
        representations.Order: order,
        representations.Orders: {"orders": [order], "next": None},
        representations.Timeline: {
            "order_no": "KOM1", "status": "in_transit", "set_aside": None, "entries": entries, "next": None,
        },
        representations.OrderEvents: {"events": [*map(representations.order_event, recorded)], "next": None},
        representations.LogEvents: {"events": [*map(representations.log_event, recorded)], "next": None},
        representations.Transitions: {"transitions": transitions, "next": None},
        representations.Receipt: asdict(receipt),
        representations.QuarantineEntries: {"entries": [entry], "next": None},
        representations.QuarantineEntry: {**entry, "body_base64": "e30="},
        representations.Projections: {"head": 2, "projections": [{**view, "set_aside": []}]},
        representations.Statistics: representations.statistics(counted),
        representations.Health: {"status": "alive"},
    }  # fmt: skip
    return {kind: orjson.loads(orjson.dumps(value, option=orjson.OPT_UTC_Z)) for kind, value in made.items()}


EXAMPLES: Final = _examples()
