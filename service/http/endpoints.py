"""Endpoints: the declaration of each handler defines its route, parses its query and documents it."""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from inspect import cleandoc
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, TypeVar

from aiohttp import hdrs, web
from pydantic import BaseModel

from service.database.api_keys import Scope
from service.database.connections import READER
from service.database.log_identity import LogIdentity
from service.http.access import Access, Handler
from service.http.parameters import FORMAT, Query, read_query
from service.http.problems import Explained, ProblemError, ProblemType, another_log, bad_parameter, unavailable
from service.http.responses import LOG_HEADER

JSON: Final = "application/json"
CSV: Final = "text/csv"
NDJSON: Final = "application/x-ndjson"
SSE: Final = "text/event-stream"
TEXT: Final = "text/plain"
HTML: Final = "text/html"
OCTETS: Final = "application/octet-stream"
# The ends of the paths of the media types that a list may also have.
SUFFIXES: Final = {CSV: ".csv", NDJSON: ".ndjson"}
JSON_FORMAT: Final = "json"
# No key can have this name.
STRANGER: Final = ""

# A method of an API: it receives its object, the request and the parsed query.
Method = Callable[[Any, web.Request, Any], Awaitable[web.StreamResponse]]
AnyMethod = TypeVar("AnyMethod", bound=Method)

# The schema and the description of parameters of paths, by their names.
PathParameters: TypeAlias = Mapping[str, Mapping[str, Any]]

# The attribute of a method that holds its declaration.
_DECLARATION: Final = "declaration"


class Tag(NamedTuple):
    """A group of endpoints in the contract, such as a module of a generated client."""

    name: str
    description: str


class Api(Protocol):
    """An object whose declared methods are endpoints of one tag."""

    @property
    def tag(self) -> Tag:
        """The tag of its endpoints."""
        ...


@dataclass(frozen=True)
class Endpoint:
    """The declaration of an endpoint, used as the decorator of its method.

    Args:
        method: the HTTP method.
        path: the path, with its parameters in braces.
        response: the type of a successful response's content, None if it has none.
        query: the model of the query parameters; None if all parameters are ignored.
        scope: the scope of the required API key; None if no key is required.
        body: the model of the request body, None if the endpoint has none.
        status: the status of a successful response.
        problems: possible problems, besides those that the path, query, body, scope and media imply.
        media: the media type of the response. Each media type has its own path, since the clients that are
            generated from the contract can then give each response one type.
        has_etag: whether the response has an entity tag, and may be 304.
        has_path_rest: whether the last parameter of the path may have slashes.
        public_setting: the setting with which the endpoint needs no key, if there is one.
        summary: one line; by default the first line of the method's docstring.
        description: further sentences; by default the rest of the docstring.
        operation_id: the name of the operation; by default the method's name in camel case.
    """

    method: str
    path: str
    response: Any
    query: type[Query] | None = Query
    scope: Scope | None = "read"
    body: type[BaseModel] | None = None
    status: HTTPStatus = HTTPStatus.OK
    problems: tuple[Explained | HTTPStatus, ...] = ()
    media: str = JSON
    has_etag: bool = False
    has_path_rest: bool = False
    public_setting: str = ""
    summary: str = ""
    description: str = ""
    operation_id: str = ""

    @property
    def all_problems(self) -> set[Explained | HTTPStatus]:
        """All problems that a request may be answered with."""
        problems: set[Explained | HTTPStatus] = {*self.problems}
        # A stream requires chunked encoding, which HTTP/1.0 lacks.
        if self.media in {NDJSON, SSE}:
            problems |= {ProblemType.HTTP_VERSION, ProblemType.OVER_BUDGET}
        if self.query is not None:
            problems.add(ProblemType.BAD_PARAMETER)
            if {"after", "after_position"} & set(self.query.model_fields):
                problems.add(ProblemType.BEYOND_HEAD)
            if "last" in self.query.model_fields:
                problems.add(ProblemType.ANOTHER_EVENT)
            if "log" in self.query.model_fields:
                problems.add(ProblemType.ANOTHER_LOG)
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
        summary, _, description = cleandoc(method.__doc__ or "").partition("\n\n")
        declaration = replace(
            self,
            summary=self.summary or " ".join(summary.split()),
            description=self.description or " ".join(description.split()),
            operation_id=self.operation_id or _to_camel_case(method.__name__),
        )
        setattr(method, _DECLARATION, declaration)
        return method


class OutgoingRequest(NamedTuple):
    """A request that the service sends to other systems, as the contract describes it.

    Attributes:
        name: its name.
        summary: one line.
        body: the type of its body.
        headers: its headers, each with a description.
    """

    name: str
    summary: str
    body: Any
    headers: Mapping[str, str]


def _to_camel_case(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


def endpoints(api: object) -> Iterator[tuple[Endpoint, Method]]:
    """Yield the declared methods of an object, in their order."""
    for member in vars(type(api)).values():
        if isinstance(endpoint := getattr(member, _DECLARATION, None), Endpoint):
            yield endpoint, member


def make_routes(api: object, access: Access, log: LogIdentity) -> list[web.RouteDef]:
    """Return the routes of an object's declared methods, each guarded as declared.

    Args:
        api: the object.
        access: checks the API keys.
        log: the log's id, which every response has that requires an API key.
    """
    declared = {endpoint.path: (endpoint, method) for endpoint, method in endpoints(api)}
    routes = []
    for endpoint, method in endpoints(api):
        handler = _with_query(log, endpoint, method.__get__(api))
        for media, suffix in SUFFIXES.items():
            if endpoint.path + suffix in declared:
                other, other_method = declared[endpoint.path + suffix]
                handler = _negotiating(
                    media,
                    _with_query(log, other, other_method.__get__(api), FORMAT),
                    _with_query(log, endpoint, method.__get__(api), FORMAT),
                )
        is_public = endpoint.public_setting and getattr(api, "is_public", False)
        if is_public:
            handler = _as_stranger(handler)
        elif endpoint.scope is not None:
            handler = access.require(endpoint.scope, handler)
        # aiohttp's own pattern of a parameter excludes braces, which an order number may have.
        path = endpoint.path.replace("}", ":[^/]+}")
        if endpoint.has_path_rest:
            path = f"{path.removesuffix(':[^/]+}')}:.+}}"
        routes.append(web.route(endpoint.method, path, handler))
    return routes


def _as_stranger(handler: Handler) -> Handler:
    """Return a handler whose readers have one share of the database's connections, as one key has."""

    async def serve(request: web.Request) -> web.StreamResponse:
        READER.set(STRANGER)
        return await handler(request)

    return serve


def _negotiating(media: str, other: Handler, handler: Handler) -> Handler:
    """Return a handler that lets ``other`` respond if a request prefers its media type.

    The contract describes the path of each media type alone. For people, the path without a suffix will do.
    """

    async def negotiate(request: web.Request) -> web.StreamResponse:
        accept = request.headers.get(hdrs.ACCEPT, "")
        chosen = request.query.get(FORMAT) if request.query_string else None
        if chosen not in {None, JSON_FORMAT, SUFFIXES[media][1:]}:
            raise bad_parameter(FORMAT, f"it must be {JSON_FORMAT} or {SUFFIXES[media][1:]}")
        is_preferred = media in accept and JSON not in accept if chosen is None else chosen != JSON_FORMAT
        response = await (other if is_preferred else handler)(request)
        if not response.prepared:
            response.headers[hdrs.VARY] = hdrs.ACCEPT
        return response

    return negotiate


def _with_query(
    log: LogIdentity,
    endpoint: Endpoint,
    method: Callable[[web.Request, Any], Awaitable[web.StreamResponse]],
    handled: str | None = None,
) -> Handler:
    model = endpoint.query or Query
    defaults = model()
    takes_log = "log" in model.model_fields

    def read(request: web.Request) -> Any:
        return read_query(model, request, handled) if request.query_string else defaults

    async def handle(request: web.Request) -> web.StreamResponse:
        return await method(request, read(request))

    async def handle_naming_log(request: web.Request) -> web.StreamResponse:
        query, log_id = read(request), log.log_id
        try:
            if takes_log and query.log not in {None, log_id}:
                raise another_log(log_id, query.log)
            response = await method(request, query)
            # Only a read can be sent again without a second thought.
            if log.log_id != log_id and request.method != hdrs.METH_POST and not response.prepared:
                raise unavailable("the database was replaced during the request")
        except ProblemError as error:
            error.headers[LOG_HEADER] = log_id
            raise
        # The head of a stream is sent already.
        if not response.prepared:
            response.headers[LOG_HEADER] = log_id
        return response

    return handle if endpoint.scope is None else handle_naming_log
