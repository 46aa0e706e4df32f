"""The machine-readable contract: the OpenAPI document and the problem types, made from the declarations."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from http import HTTPStatus
from inspect import getdoc
from itertools import groupby
from operator import itemgetter
from typing import Any, Final

from aiohttp import hdrs, web
from pydantic import BaseModel, TypeAdapter

from service import VERSION
from service.api.events import LAST_EVENT_ID
from service.http.endpoints import CSV, JSON, NDJSON, SSE, TEXT, Endpoint, endpoints
from service.http.parameters import Query
from service.http.problems import ProblemError, ProblemType
from service.http.responses import json_response, response
from service.ingest.idempotency import KEY_BYTES_MAX, KEY_HEADERS
from service.ingest.recorder import Receipt

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
# Media types whose content has no JSON schema.
NOT_JSON: Final = {
    CSV: "The list as a table. The `Link` header leads to the next page.",
    NDJSON: "One event on each line, up to the head of the log.",
    TEXT: "Plain text.",
    SSE: "`event: status_reported`; its `id` is the position, its `data` an event as in `GET /events`. "
    "With `brief`: `event: log_grown`; its `data` has the position.",
}


class ReportBody(BaseModel):
    """The body of a webhook. Further members are kept."""

    order_no: str | int
    status: str
    cnote: str | int | None = None
    timestamp: str | int | float | None = None


class OpenApi:
    """Serves the contract.

    Args:
        apis: the objects whose endpoints are documented.
        webhook_path: the pattern of the webhook's path.
    """

    def __init__(self, apis: Iterable[object], webhook_path: str) -> None:
        declared = [endpoint for api in (*apis, self) for endpoint, _ in endpoints(api)]
        self.document = make_document([*_webhook_endpoints(webhook_path), *declared])

    @Endpoint("GET", "/openapi.json", dict, scope=None)
    async def show_document(self, _request: web.Request, _query: Query) -> web.Response:
        """This document."""
        return json_response(self.document)

    @Endpoint("GET", "/problems/{slug}", str, scope=None, problems=(HTTPStatus.NOT_FOUND,), media=(TEXT,))
    async def show_problem(self, request: web.Request, _query: Query) -> web.Response:
        """The explanation of a problem's type."""
        for problem_type in ProblemType:
            if problem_type.slug == request.match_info["slug"]:
                text = f"{problem_type.status} {problem_type.title}\n\n{problem_type.explanation}\n"
                return response(text.encode(), "text/plain; charset=utf-8")
        raise ProblemError(HTTPStatus.NOT_FOUND)


def make_document(declared: Collection[Endpoint]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of endpoints."""
    schemas, references = _schemas(declared)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in declared:
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


def _webhook_endpoints(path: str) -> list[Endpoint]:
    own = (ProblemType.BAD_SIGNATURE, ProblemType.FORBIDDEN, HTTPStatus.NOT_FOUND, ProblemType.UNAVAILABLE)
    summary = "Receive a report. 200 means that it is committed."
    declare = partial(Endpoint, query=None, scope=None, body=ReportBody, problems=own, summary=summary)
    return [declare("PUT", path, Receipt), declare("POST", path, Receipt)]


def _schemas(declared: Iterable[Endpoint]) -> tuple[dict[str, Any], dict[Any, dict[str, Any]]]:
    """Return every schema by its name, and the reference to each type's schema."""
    types = {endpoint.response for endpoint in declared} | {one.body for one in declared if one.body}
    adapters = [(one, "serialization", TypeAdapter(one)) for one in sorted(types, key=str)]
    by_type, definitions = TypeAdapter.json_schemas(adapters, ref_template=REFERENCE)  # type: ignore[arg-type]
    return {**definitions["$defs"], "Problem": PROBLEM_SCHEMA}, {
        one: schema for (one, _), schema in by_type.items()
    }


def _operation(endpoint: Endpoint, references: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": re.sub(r"[\W_]", "", endpoint.method.lower() + endpoint.path.title()),
        "summary": endpoint.summary,
        "parameters": [
            *_path_parameters(endpoint.path),
            *_query_parameters(endpoint.query),
            *_header_parameters(endpoint),
        ],
        "responses": {
            "200": _success(endpoint, references[endpoint.response]),
            **({"304": {"description": "The client's copy is current."}} if endpoint.has_etag else {}),
            **_failures(endpoint),
        },
    }
    if endpoint.body is not None:
        schema = references[endpoint.body]
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    if endpoint.scope is not None:
        operation["security"] = [{"key": []}, {}]
        operation["description"] = f"Requires an API key with the scope `{endpoint.scope}` once any key exists."
    return operation


def _path_parameters(path: str) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", path):
        text = {"type": "string", "minLength": 1}
        schema = {"type": "integer", "minimum": 1} if name == "quarantine_id" else text
        yield {"name": name, "in": "path", "required": True, "schema": schema}


def _query_parameters(query: type[Query] | None) -> Iterator[dict[str, Any]]:
    for name, member in (query or Query).model_json_schema().get("properties", {}).items():
        schema = {key: value for key, value in member.items() if key not in ("title", "description", "default")}
        if "anyOf" in schema:
            # An optional parameter is null inside the service, and cannot be sent as null.
            (schema,) = [one for one in schema["anyOf"] if one != {"type": "null"}]
        if member.get("default") is not None:
            schema = {**schema, "default": member["default"]}
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
    if SSE in endpoint.media:
        position = {"type": "integer", "minimum": 0}
        headers.append((LAST_EVENT_ID, position, "The last position that the client has seen."))
    for name, schema, description in headers:
        yield {"name": name, "in": "header", "required": False, "schema": schema, "description": description}


def _success(endpoint: Endpoint, reference: dict[str, Any]) -> dict[str, Any]:
    content = {
        media: {"schema": reference if media == JSON else {"type": "string", "description": NOT_JSON[media]}}
        for media in endpoint.media
    }
    # The docstring of a plain dict or str would describe Python.
    is_declared = endpoint.response.__module__ != "builtins"
    return {"description": getdoc(endpoint.response) if is_declared else endpoint.summary, "content": content}


def _failures(endpoint: Endpoint) -> dict[str, Any]:
    failures: dict[str, Any] = {}
    described = sorted(_describe(problem) for problem in endpoint.all_problems)
    for status, problems in groupby(described, key=itemgetter(0)):
        failures[str(status)] = {
            "description": " ".join(description for _, description in problems),
            "headers": {"X-Request-Id": {"schema": {"type": "string"}, "description": "The id in the logs."}},
            "content": {PROBLEM_MEDIA: {"schema": {"$ref": REFERENCE.format(model="Problem")}}},
        }
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            retry_after = {"schema": {"type": "integer"}, "description": "In seconds."}
            failures[str(status)]["headers"]["Retry-After"] = retry_after
    return failures


def _describe(problem: ProblemType | HTTPStatus) -> tuple[int, str]:
    if isinstance(problem, ProblemType):
        return problem.status, f"{problem.title} (`{problem.uri}`): {problem.explanation}"
    return problem.value, problem.phrase
