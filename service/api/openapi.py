"""The machine-readable contract: the OpenAPI document and the problem types, made from the declarations."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from http import HTTPStatus
from itertools import groupby
from operator import itemgetter
from typing import Any, Final, get_args

from aiohttp import hdrs, web
from pydantic import BaseModel, Field, TypeAdapter

from domain.statuses import Status
from domain.transitions import Leg, Verdict
from projections.order_list import Sort
from service import VERSION
from service.api.events import LAST_EVENT_ID
from service.database.operations import Action, Via
from service.http.endpoints import (
    CSV,
    JSON,
    NDJSON,
    SSE,
    TEXT,
    Api,
    Endpoint,
    OutgoingRequest,
    PathParameters,
    Tag,
    endpoints,
)
from service.http.parameters import Query
from service.http.problems import Explained, ProblemError, ProblemType
from service.http.responses import LOG_HEADER, json_response, response
from service.ingest.idempotency import KEY_BYTES_MAX, KEY_HEADERS
from service.ingest.quarantine import QuarantineState
from service.ingest.recorder import Outcome, Receipt
from service.ingest.webhook import METHODS
from service.ingest.webhook_auth import PATH, PATH_WITH_TOKEN

REFERENCE: Final = "#/components/schemas/{model}"
DESCRIPTION: Final = (
    "Orders, their timelines, recorded events and verdicts. Lists are paged by `next`. "
    "Every error is an RFC 9457 problem."
)
PROBLEM_MEDIA: Final = "application/problem+json"
PROBLEM_SCHEMA: Final = {
    "type": "object",
    "description": "An RFC 9457 problem. Some have further members, such as `parameter`.",
    "properties": {
        "type": {"type": "string", "format": "uri-reference"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": ["string", "null"]},
    },
    "required": ["type", "title", "status", "detail"],
}
# The schemas of enumerations, by their names, so that a client has one type for each of them.
ENUMERATIONS: Final[Mapping[str, tuple[Any, str]]] = {
    "Status": (Status, "A status of an order."),
    "Verdict": (Verdict, "The judgement on a report, by the transition table."),
    "Outcome": (Outcome, "The verdict on a report, or that its body was quarantined."),
    "Leg": (Leg, "The part of the journey on which an order's problem arose."),
    "QuarantineState": (QuarantineState, "Whether a quarantined body is open, or how it was resolved."),
    "Action": (Action, "An operator's action."),
    "Via": (Via, "The way by which an operator acted."),
    "Sort": (Sort, "The report by which orders are sorted, newest first."),
}
PUBLIC: Final = " With `{setting}`, it requires none."
# The description of a response that has no JSON schema.
NOT_JSON: Final = {
    CSV: "A list or a page of it as CSV (RFC 4180) with a heading. Nested members are columns: `counts.late`.",
    NDJSON: "One event on each line, as in `GET /events`. Without its last chunk, the response was cut off.",
    TEXT: "Plain text.",
    SSE: "`event: status_reported`; its `id` is the position, its `data` an event as in `GET /events`. "
    "`event: order_erased`; its `data` is an erasure as in `GET /erasures`. "
    "With `brief`: `event: log_grown`; its `data` has the position.",
}
PATH_PARAMETERS: Final[PathParameters] = {
    "order_no": {"schema": {"type": "string", "minLength": 1}, "description": "the order number"},
    "version": {"schema": {"type": "integer", "minimum": 1}, "description": "the version of the event"},
    "quarantine_id": {"schema": {"type": "integer", "minimum": 1}, "description": "the id of the entry"},
    "slug": {"schema": {"type": "string", "minLength": 1}, "description": "the end of a problem's `type`"},
    "token": {
        "schema": {"type": "string", "minLength": 1},
        "description": "one of the service's webhook tokens",
    },
}
WEBHOOK_TAG: Final = Tag("webhook", "Where the sender reports status changes.")
# Both paths are always described, so that a client fits every configuration.
WEBHOOK_PATHS: Final = {
    PATH: ("Report", "Use this path if the service has no webhook tokens; otherwise it gets 404."),
    PATH_WITH_TOKEN: (
        "ReportWithToken",
        "Use this path if the service has webhook tokens; otherwise, and with a wrong token, it gets 404.",
    ),
}


class ReportBody(BaseModel):
    """A report of an order's status. Further members are kept in the event's `body`."""

    order_no: str | int = Field(description="the order number: 1 to 128 characters, or up to 18 digits")
    status: str = Field(description="the status in the sender's words, 1 to 128 characters")
    cnote: str | int | None = Field(default=None, description="the airway bill, 1 to 128 characters")
    timestamp: str | int | float | None = Field(
        default=None,
        description="when it happened: RFC 3339 with an offset, or seconds or milliseconds since 1970",
    )


class OpenApi:
    """Serves the contract.

    Args:
        apis: the objects whose endpoints are documented.
        outgoing: the requests to other systems, which are documented too.
        problems: the problem types of features.
    """

    tag = Tag("contract", "This document, and the explanations of problem types.")

    def __init__(
        self,
        apis: Collection[Api],
        outgoing: Collection[OutgoingRequest] = (),
        problems: Iterable[Explained] = (),
    ) -> None:
        declared = [(api.tag, endpoint) for api in (*apis, self) for endpoint, _ in endpoints(api)]
        parameters: PathParameters = {}
        for api in apis:
            parameters = {**parameters, **getattr(api, "path_parameters", {})}
        self._problems = (*ProblemType, *problems)
        self.document = make_document(
            [*_webhook_endpoints(), *declared], outgoing, {**PATH_PARAMETERS, **parameters}
        )

    @Endpoint("GET", "/openapi.json", dict, scope=None)
    async def get_openapi(self, _request: web.Request, _query: Query) -> web.Response:
        """Get this document."""
        return json_response(self.document)

    @Endpoint("GET", "/problems/{slug}", str, scope=None, problems=(HTTPStatus.NOT_FOUND,), media=TEXT)
    async def get_problem_type(self, request: web.Request, _query: Query) -> web.Response:
        """Get the explanation of a problem type."""
        for problem_type in self._problems:
            if problem_type.slug == request.match_info["slug"]:
                text = f"{problem_type.status} {problem_type.title}\n\n{problem_type.explanation}\n"
                return response(text.encode(), "text/plain; charset=utf-8")
        raise ProblemError(HTTPStatus.NOT_FOUND)


def make_document(
    declared: Collection[tuple[Tag, Endpoint]],
    outgoing: Collection[OutgoingRequest] = (),
    parameters: PathParameters = PATH_PARAMETERS,
) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document.

    Args:
        declared: the endpoints, each with its tag.
        outgoing: the requests to other systems.
        parameters: the schemas and descriptions of the parameters of paths.
    """
    types = {one for _, endpoint in declared for one in (endpoint.response, endpoint.body) if one}
    schemas, references = _schemas(types | {one.body for one in outgoing})
    paths: dict[str, dict[str, Any]] = {}
    for tag, endpoint in declared:
        operation = {"tags": [tag.name], **_operation(endpoint, references, parameters)}
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "Order tracking for Komerce",
            "version": VERSION,
            "description": DESCRIPTION,
            "contact": {"name": "The operator of this service"},
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/", "description": "The service that serves this document."}],
        # Until the first key exists, programs of the same machine need none.
        "security": [{"key": []}, {}],
        "tags": [tag._asdict() for tag in dict.fromkeys(tag for tag, _ in declared)],
        "paths": paths,
        "webhooks": {one.name: {"post": _receive(one, references[one.body])} for one in outgoing},
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "`otk_...`"}},
        },
    }


def _webhook_endpoints() -> Iterator[tuple[Tag, Endpoint]]:
    for path, (name, description) in WEBHOOK_PATHS.items():
        for method in METHODS:
            yield (
                WEBHOOK_TAG,
                Endpoint(
                    method,
                    path,
                    Receipt,
                    query=None,
                    scope=None,
                    body=ReportBody,
                    problems=(
                        *(ProblemType.BAD_SIGNATURE, ProblemType.FORBIDDEN),
                        *(HTTPStatus.NOT_FOUND, ProblemType.UNAVAILABLE, ProblemType.LOOP_DETECTED),
                    ),
                    summary=f"Send a report by {method}.",
                    description=f"200 means that the report is committed. {description}",
                    operation_id=method.lower() + name,
                ),
            )


def _receive(request: OutgoingRequest, reference: Mapping[str, Any]) -> dict[str, Any]:
    """Return the operation that an endpoint of another system has for a request."""
    return {
        "operationId": f"receive{request.name[0].upper()}{request.name[1:]}",
        "summary": request.summary,
        "security": [],
        "parameters": [
            {"name": name, "in": "header", "schema": {"type": "string"}, "description": description}
            for name, description in request.headers.items()
        ],
        "requestBody": {"required": True, "content": {JSON: {"schema": reference}}},
        "responses": {
            "2XX": {"description": "The message is accepted."},
            "410": {"description": "An event is refused, and the subscription is disabled."},
            "default": {"description": "A failure. An event is sent again later."},
        },
    }


def _schemas(types: Iterable[Any]) -> tuple[dict[str, Any], dict[Any, dict[str, Any]]]:
    """Return every schema by its name, and the reference to each type's schema."""
    adapters = [(one, "serialization", TypeAdapter(one)) for one in sorted(types, key=str)]
    by_type, definitions = TypeAdapter.json_schemas(adapters, ref_template=REFERENCE)  # type: ignore[arg-type]
    enumerations = {
        name: {"type": "string", "enum": [*get_args(values)], "description": description}
        for name, (values, description) in ENUMERATIONS.items()
    }
    schemas = {**_tidy(definitions["$defs"], has_names=True), **enumerations, "Problem": PROBLEM_SCHEMA}
    return dict(sorted(schemas.items())), {one: _tidy(schema) for (one, _), schema in by_type.items()}


def _tidy(schema: Any, *, has_names: bool = False) -> Any:
    """Return a schema of pydantic's as the document has it.

    Enumerations become references. Titles, which only repeat names, and nulls as defaults are left out.

    Args:
        schema: the schema, or a part of it.
        has_names: whether the keys are names of members or schemas, not keywords.
    """
    if isinstance(schema, list):
        return [_tidy(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if has_names:
        return {name: _tidy(member) for name, member in schema.items()}
    for name, (values, _) in ENUMERATIONS.items():
        if schema.get("enum") == [*get_args(values)]:
            return {"$ref": REFERENCE.format(model=name)}
    return {
        keyword: _to_markdown(value)
        if keyword == "description"
        else _tidy(value, has_names=keyword == "properties")
        for keyword, value in schema.items()
        if keyword != "title" and (keyword, value) != ("default", None)
    }


def _to_markdown(docstring: str) -> str:
    """Return a docstring with its lines joined, and with single backticks."""
    paragraphs = docstring.replace("``", "`").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _operation(
    endpoint: Endpoint,
    references: Mapping[Any, dict[str, Any]],
    parameters: PathParameters,
) -> dict[str, Any]:
    access = (
        f"Requires an API key with the scope `{endpoint.scope}` once any key exists."
        if endpoint.scope is not None
        else "Requires no API key."
    )
    operation: dict[str, Any] = {
        "operationId": endpoint.operation_id,
        "summary": endpoint.summary,
        "description": f"{endpoint.description} {access}{_describe_public(endpoint)}".strip(),
        "parameters": [
            *_path_parameters(endpoint.path, parameters),
            *_query_parameters(endpoint.query),
            *_header_parameters(endpoint),
        ],
        "responses": {
            str(endpoint.status.value): _success(endpoint, references.get(endpoint.response, {})),
            **({"304": {"description": "The client's copy is current."}} if endpoint.has_etag else {}),
            **_failures(endpoint),
        },
    }
    if endpoint.body is not None:
        schema = references[endpoint.body]
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    if endpoint.scope is None:
        operation["security"] = []
    return operation


def _describe_public(endpoint: Endpoint) -> str:
    return PUBLIC.format(setting=endpoint.public_setting) if endpoint.public_setting else ""


def _path_parameters(path: str, described: PathParameters) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", path):
        yield {"name": name, "in": "path", "required": True, **described[name]}


def _query_parameters(query: type[Query] | None) -> Iterator[dict[str, Any]]:
    for name, member in (query or Query).model_json_schema().get("properties", {}).items():
        schema = {key: value for key, value in _tidy(member).items() if key != "description"}
        if "anyOf" in schema:
            # An optional parameter is null inside the service, and cannot be sent as null.
            (schema,) = [one for one in schema["anyOf"] if one != {"type": "null"}]
        parameter = {"name": name, "in": "query", "required": False, "schema": schema}
        if "description" in member:
            parameter["description"] = member["description"]
        yield parameter


def _header_parameters(endpoint: Endpoint) -> Iterator[dict[str, Any]]:
    text: dict[str, Any] = {"type": "string"}
    headers: list[tuple[str, dict[str, Any], str]] = []
    if endpoint.body is ReportBody:
        description = f"The same key and body for an order get the first receipt; up to {KEY_BYTES_MAX} bytes."
        headers += [(name, text, description) for name in KEY_HEADERS]
    if endpoint.has_etag:
        headers.append((str(hdrs.IF_NONE_MATCH), text, "The `ETag` of the client's copy."))
    if endpoint.media == SSE:
        position = {"type": "integer", "minimum": 0}
        headers.append((LAST_EVENT_ID, position, "The last position that the client has seen."))
    for name, schema, description in headers:
        yield {"name": name, "in": "header", "required": False, "schema": schema, "description": description}


def _success(endpoint: Endpoint, reference: dict[str, Any]) -> dict[str, Any]:
    description: str = NOT_JSON.get(endpoint.media, endpoint.summary)
    # The docstring of a plain dict or str would describe Python.
    if endpoint.response is not None and endpoint.response.__module__ != "builtins":
        description = _to_markdown(endpoint.response.__doc__)
    headers: dict[str, Any] = (
        _log_header() if endpoint.scope is not None or endpoint.response is Receipt else {}
    )
    if endpoint.has_etag:
        headers["ETag"] = {"schema": {"type": "string"}, "description": "Send it back as If-None-Match."}
    if endpoint.media in {JSON, CSV} and endpoint.query is not None and "limit" in endpoint.query.model_fields:
        headers["Link"] = {"schema": {"type": "string"}, "description": "Leads to the next page (RFC 8288)."}
    schema = reference if endpoint.media == JSON else {"type": "string"}
    content = {} if endpoint.response is None else {"content": {endpoint.media: {"schema": schema}}}
    return {"description": description, **({"headers": headers} if headers else {}), **content}


def _log_header() -> dict[str, Any]:
    schema = {"type": "string", "format": "uuid"}
    return {LOG_HEADER: {"schema": schema, "description": "The id of the log that positions belong to."}}


def _failures(endpoint: Endpoint) -> dict[str, Any]:
    failures: dict[str, Any] = {}
    described = sorted(_describe(problem) for problem in endpoint.all_problems)
    for status, problems in groupby(described, key=itemgetter(0)):
        failures[str(status)] = {
            "description": " ".join(description for _, description in problems),
            "headers": {"X-Request-Id": {"schema": {"type": "string"}, "description": "The id in the logs."}},
            "content": {PROBLEM_MEDIA: {"schema": {"$ref": REFERENCE.format(model="Problem")}}},
        }
        if status == HTTPStatus.GONE:
            failures[str(status)]["headers"] |= _log_header()
        if status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
            retry_after = {"schema": {"type": "integer"}, "description": "In seconds."}
            failures[str(status)]["headers"]["Retry-After"] = retry_after
    return failures


def _describe(problem: Explained | HTTPStatus) -> tuple[int, str]:
    if isinstance(problem, Explained):
        return problem.status, f"{problem.title} (`{problem.uri}`): {problem.explanation}"
    return problem.value, problem.phrase
