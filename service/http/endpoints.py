"""Endpoints: the declaration of each handler defines its route, parses its query and documents it."""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Final, TypeVar

from aiohttp import web
from pydantic import BaseModel

from service.database.api_keys import Scope
from service.http.access import Access, Handler
from service.http.parameters import Query, read_query
from service.http.problems import ProblemType

JSON: Final = "application/json"
CSV: Final = "text/csv"
NDJSON: Final = "application/x-ndjson"
SSE: Final = "text/event-stream"
TEXT: Final = "text/plain"

# A method of an API: it receives its object, the request and the parsed query.
Method = Callable[[Any, web.Request, Any], Awaitable[web.StreamResponse]]
AnyMethod = TypeVar("AnyMethod", bound=Method)

# The attribute of a method that holds its declaration.
_DECLARATION: Final = "declaration"


@dataclass(frozen=True)
class Endpoint:
    """The declaration of an endpoint, used as the decorator of its method.

    Args:
        method: the HTTP method.
        path: the path, with its parameters in braces.
        response: the type of a 200 response's content.
        query: the model of the query parameters; None if all parameters are ignored.
        scope: the scope of the required API key; None if no key is required.
        body: the model of the request body, None if the endpoint has none.
        problems: possible problems, besides those that the path, query, body, scope and media imply.
        media: the media types of the response.
        has_etag: whether the response has an entity tag, and may be 304.
        summary: one line; by default the method's docstring.
    """

    method: str
    path: str
    response: Any
    query: type[Query] | None = Query
    scope: Scope | None = "read"
    body: type[BaseModel] | None = None
    problems: tuple[ProblemType | HTTPStatus, ...] = ()
    media: tuple[str, ...] = (JSON,)
    has_etag: bool = False
    summary: str = ""

    @property
    def all_problems(self) -> set[ProblemType | HTTPStatus]:
        """All problems that a request may be answered with."""
        problems = {*self.problems}
        # A stream requires chunked encoding, which HTTP/1.0 lacks.
        if NDJSON in self.media or SSE in self.media:
            problems |= {ProblemType.HTTP_VERSION, ProblemType.OVER_BUDGET}
        if self.query is not None:
            problems.add(ProblemType.BAD_PARAMETER)
            if {"after", "after_position"} & set(self.query.model_fields):
                problems.add(ProblemType.BEYOND_HEAD)
            if "last" in self.query.model_fields:
                problems.add(ProblemType.ANOTHER_EVENT)
            if "{" in self.path:
                problems.add(ProblemType.BAD_PATH)
        if self.scope is not None:
            problems |= {ProblemType.UNAUTHORIZED, ProblemType.FORBIDDEN, ProblemType.UNAVAILABLE}
        if self.body is not None:
            problems |= {
                *(ProblemType.BAD_BODY, ProblemType.BODY_TIMEOUT),
                *(ProblemType.TOO_LARGE, ProblemType.UNKNOWN_CODING, ProblemType.OVER_BUDGET),
            }
        return problems

    def __call__(self, method: AnyMethod) -> AnyMethod:
        """Declare a method."""
        summary = self.summary or (method.__doc__ or "").strip()
        setattr(method, _DECLARATION, replace(self, summary=summary))
        return method


def endpoints(api: object) -> Iterator[tuple[Endpoint, Method]]:
    """Yield the declared methods of an object, in their order."""
    for member in vars(type(api)).values():
        if isinstance(endpoint := getattr(member, _DECLARATION, None), Endpoint):
            yield endpoint, member


def make_routes(api: object, access: Access) -> list[web.RouteDef]:
    """Return the routes of an object's declared methods, each guarded as declared."""
    routes = []
    for endpoint, method in endpoints(api):
        handler = _with_query(endpoint.query or Query, method.__get__(api))
        if endpoint.scope is not None:
            handler = access.require(endpoint.scope, handler)
        # aiohttp's own pattern of a parameter excludes braces, which an order number may have.
        routes.append(web.route(endpoint.method, endpoint.path.replace("}", ":[^/]+}"), handler))
    return routes


def _with_query(
    model: type[Query], method: Callable[[web.Request, Any], Awaitable[web.StreamResponse]]
) -> Handler:
    defaults = model()

    async def handle(request: web.Request) -> web.StreamResponse:
        return await method(request, read_query(model, request) if request.query_string else defaults)

    return handle
