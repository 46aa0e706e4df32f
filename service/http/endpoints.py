"""What can be asked over HTTP: a declaration beside each handler makes its route and is its documentation."""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Final, TypeVar

from aiohttp import web
from pydantic import BaseModel

from service.http.access import Access, Scope
from service.http.parameters import Query, read_query
from service.http.problems import Handler, Kind

JSON: Final = "application/json"
CSV: Final = "text/csv"
NDJSON: Final = "application/x-ndjson"
SSE: Final = "text/event-stream"

Asked = Callable[[Any, web.Request, Any], Awaitable[web.StreamResponse]]
AnyHandler = TypeVar("AnyHandler", bound=Asked)

# Where an endpoint's declaration lies on its handler.
DECLARATION: Final = "declaration"


@dataclass(frozen=True)
class Endpoint:
    """What is declared of a handler.

    Args:
        method: of HTTP.
        path: with its parameters in braces.
        answers: the type of what a 200 holds.
        query: the parameters that it takes; None where whatever comes is passed over.
        scope: what a key must be good for; None where no key is asked for.
        body: the type of what is sent, None where nothing is.
        problems: that it may be answered with, beside those that its path, query, body and scope bring.
        media: the forms that the answer may take.
        has_etag: whether the answer has an entity tag, and may be 304.
        is_listed: whether the documentation has it.
        summary: one line; the handler's docstring, where it is left out.
    """

    method: str
    path: str
    answers: Any
    query: type[Query] | None = Query
    scope: Scope | None = "read"
    body: type[BaseModel] | None = None
    problems: tuple[Kind | HTTPStatus, ...] = ()
    media: tuple[str, ...] = (JSON,)
    has_etag: bool = False
    is_listed: bool = True
    summary: str = ""

    @property
    def all_problems(self) -> set[Kind | HTTPStatus]:
        """What it may be answered with."""
        found = {*self.problems}
        if self.query is not None:
            found |= {Kind.BAD_PARAMETER, Kind.BAD_PATH} if "{" in self.path else {Kind.BAD_PARAMETER}
        if self.scope is not None:
            found |= {Kind.UNAUTHORIZED, Kind.FORBIDDEN, Kind.UNAVAILABLE}
        if self.body is not None:
            found |= {Kind.BAD_BODY, Kind.TOO_SLOW, Kind.TOO_LARGE, Kind.UNKNOWN_CODING}
        return found

    def __call__(self, handler: AnyHandler) -> AnyHandler:
        """Declare a method: it is given the request, and the query as it was read."""
        summary = self.summary or (handler.__doc__ or "").strip()
        setattr(handler, DECLARATION, replace(self, summary=summary))
        return handler


def declared(api: object) -> Iterator[tuple[Endpoint, Asked]]:
    """Yield what is declared of an object's methods, in their order."""
    for member in vars(type(api)).values():
        if isinstance(endpoint := getattr(member, DECLARATION, None), Endpoint):
            yield endpoint, member


def routes_of(api: object, access: Access) -> list[web.RouteDef]:
    """Return the routes of an object's declared methods, each guarded as declared."""
    routes = []
    for endpoint, method in declared(api):
        handler = _reading(endpoint.query or Query, method.__get__(api))
        guarded = access.requires(endpoint.scope, handler) if endpoint.scope is not None else handler
        # An order number may have braces, which aiohttp's own pattern of a parameter leaves out.
        path = endpoint.path.replace("}", ":[^/]+}")
        routes.append((web.get if endpoint.method == "GET" else web.post)(path, guarded))
    return routes


def _reading(query: type[Query], ask: Callable[[web.Request, Any], Awaitable[web.StreamResponse]]) -> Handler:
    nothing_asked = query()

    async def handle(request: web.Request) -> web.StreamResponse:
        return await ask(request, read_query(query, request) if request.query_string else nothing_asked)

    return handle
