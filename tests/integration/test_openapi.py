"""The OpenAPI document is valid and complete, and agrees with the running service."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import SecretStr

from domain.statuses import STATUSES
from domain.transitions import VERDICTS
from service import VERSION
from service.features import load_all
from service.features.settings import Settings
from service.http.pagination import CURSOR_PATTERN
from service.http.problems import ProblemType
from tests.support.client import Client
from tests.support.folders import ROOT
from tests.support.processes import RunningService
from tests.support.recording import running

pytestmark = pytest.mark.usefixtures("all_features")

SECONDS_MAX = 900


@pytest.fixture
async def document(dsn: str) -> dict[str, Any]:
    async with running(Settings(port=0), dsn) as service:
        return service.openapi.document


async def test_it_is_valid(document: dict[str, Any]) -> None:
    """The document conforms to OpenAPI 3.1, and every operation has a summary."""
    OpenAPIV31SpecValidator(document).validate()
    assert all(operation["summary"] for path in document["paths"].values() for operation in path.values())


async def test_every_after_position_waits(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a request takes ``after_position``, it waits for that position, and begins nowhere."""
    monkeypatch.setattr("service.api.freshness.HEAD_SECONDS", 0.01)
    receipt = await client.webhook("KOM1")
    paths = (await client.get("/openapi.json"))["paths"]
    parameters = {
        (path, parameter["name"]): parameter["description"]
        for path, operations in paths.items()
        for operation in operations.values()
        for parameter in operation.get("parameters", ())
    }
    waiting = {path: text for (path, name), text in parameters.items() if name == "after_position"}
    assert "/orders/{order_no}/proof" in waiting
    for path, text in waiting.items():
        assert text.startswith("wait until ")
        url = path.replace("{order_no}", "KOM1")
        assert await client.status("GET", f"{url}?after_position={receipt['position']}") == 200, url
        problem = await client.get(f"{url}?after_position={receipt['position'] + 1}", 410)
        assert problem["type"] == "/problems/beyond-the-head"


@pytest.mark.parametrize("has_tokens", [False, True])
async def test_it_has_every_route(dsn: str, document: dict[str, Any], *, has_tokens: bool) -> None:
    """The document has exactly the routes of the service, except pages, and both paths of the webhook."""
    tokens = (SecretStr("a-token-of-this-test-0123456789"),) if has_tokens else ()
    async with running(Settings(port=0, webhook_tokens=tokens), dsn) as service:
        assert service.openapi.document == document
        routes = {
            (route.method.lower(), route.resource.canonical)
            for route in service.make_app(65_536).router.routes()
            if isinstance(route, web.ResourceRoute) and route.method != "HEAD" and route.resource is not None
        }
    # The webhook's handler checks the method itself. Its path depends on the tokens.
    webhook = "/webhook/{token}" if has_tokens else "/webhook"
    assert {route for route in routes if route[0] == "*"} == {("*", webhook), ("*", f"{webhook}/")}
    routes = {route for route in routes if route[0] != "*"}
    routes |= {(method, path) for method in ("put", "post") for path in ("/webhook", "/webhook/{token}")}
    told = {(method, path) for path, operations in document["paths"].items() for method in operations}
    pages = {route for route in routes - told if re.match(PAGES, route[1])}
    assert routes - pages == told


async def test_nginx_logs_the_paths_that_hold_no_secret(dsn: str) -> None:
    """The list of paths in nginx.conf is that of the routes, without those of secrets."""
    text = (ROOT / "docs/operations/nginx.conf").read_text(encoding="utf-8")
    (listed,) = re.findall(r"\(\((audit\|[^)]+)\)", text)
    async with running(Settings(port=0), dsn) as service:
        routes = service.make_app(65_536).router.resources()
    segments = {re.escape(re.split(r"[/.]", resource.canonical)[1]) for resource in routes}
    known = {name.removesuffix(r"\.json") for name in listed.split("|")}
    assert known == segments - {"", "webhook", "t", "shares"}


# HTML pages are not a part of the contract.
PAGES = r"/$|/(t|static|track|verify|conflicts|words|quarantined|operations|deliveries|session|metrics)\b"


async def test_every_problem_belongs_to_an_operation(document: dict[str, Any]) -> None:
    """Every problem type, except for bad framing, belongs to at least one operation."""
    told = {
        title
        for operations in document["paths"].values()
        for operation in operations.values()
        for answer in operation["responses"].values()
        for title in re.findall(r"(\w[\w ]*) \(`(?:/problems/|about:blank)", answer["description"])
    }
    kinds = [*ProblemType, *(one for _, problems in load_all("problems") for one in problems)]
    assert told == {kind.title for kind in kinds} - {ProblemType.BAD_FRAMING.title}


async def test_an_operation_lists_only_its_own_problems(document: dict[str, Any]) -> None:
    """An operation lists only the problems that it can return."""
    paths = document["paths"]
    assert "404" not in paths["/orders"]["get"]["responses"]
    assert "Unknown entry" not in paths["/orders/{order_no}"]["get"]["responses"]["404"]["description"]
    assert "Bad parameter" not in paths["/webhook"]["put"]["responses"]["400"]["description"]


def success(operation: dict[str, Any]) -> dict[str, Any]:
    """Return the description of an operation's successful response."""
    (found,) = [answer for status, answer in operation["responses"].items() if status.startswith("2")]
    return found  # type: ignore[no-any-return]


async def test_a_success_is_described_by_its_declaration(document: dict[str, Any]) -> None:
    """Each success has the docstring of its type, or the summary if the type is one of Python's own."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            description = success(operation)["description"]
            assert description.endswith("."), path
            assert not description.startswith(("dict(", "str(")), path


async def test_the_logs_id_is_described(document: dict[str, Any]) -> None:
    """Receipts, and all reads that require a key, have it as a header; five reads by position take it."""
    takes_log = set()
    for operations in document["paths"].values():
        for operation in operations.values():
            is_receipt = operation["tags"] == ["webhook"]
            has_header = "X-Order-Tracking-Log" in success(operation).get("headers", {})
            assert has_header == (is_receipt or "security" not in operation), operation["operationId"]
            if any(parameter["name"] == "log" for parameter in operation["parameters"]):
                takes_log.add(operation["operationId"])
                gone = operation["responses"]["410"]
                assert "X-Order-Tracking-Log" in gone["headers"]
                assert "/problems/another-log" in gone["description"]
    assert takes_log == {"listEvents", "exportEvents", "streamEvents", "streamOrderEvents", "listOrderEvents"}


OPERATION_IDS = {
    "putReport", "postReport", "putReportWithToken", "postReportWithToken",
    "listOrders", "exportOrders", "getOrder", "getTimeline", "exportTimeline", "listOrderEvents",
    "getStatistics",
    "listContradictions", "handleContradiction",
    "listEvents", "exportEvents", "listErasures", "streamEvents", "streamOrderEvents",
    "listTransitions", "exportTransitions", "listOperations", "exportOperations", "getRules",
    "listQuarantinedBodies", "getQuarantinedBody", "retryQuarantinedBody", "discardQuarantinedBody",
    "getShareLink",
    "listSubscriptions", "addSubscription", "getSubscription", "changeSubscription", "removeSubscription",
    "testSubscription", "replaySubscription", "rotateSecret", "revokeShareLink",
    "listHeldOrders", "retryHeldOrder", "skipHeldOrder",
    "getCheckpoint", "getVerifierKeys", "getTile", "getEntryBundle", "getVerifier", "getVerifierPage",
    "getOrderProof", "getEventProof",
    "getProjections", "getLiveness", "getReadiness", "getMetrics", "getOpenapi", "getProblemType",
}  # fmt: skip


async def test_every_operation_has_a_name_and_a_tag(document: dict[str, Any]) -> None:
    """Operation ids are the names of a client's functions: if one changes, clients break."""
    operations = [one for path in document["paths"].values() for one in path.values()]
    assert sorted(one["operationId"] for one in operations) == sorted(OPERATION_IDS)
    assert {tag for one in operations for tag in one["tags"]} == {tag["name"] for tag in document["tags"]}


async def test_only_open_operations_need_no_key(document: dict[str, Any]) -> None:
    """All operations except the webhook, the probes and the contract take an API key."""
    assert document["security"] == [{"key": []}, {}]
    assert {
        path
        for path, operations in document["paths"].items()
        for operation in operations.values()
        if operation.get("security") == []
    } == {"/webhook", "/webhook/{token}", "/livez", "/readyz", "/openapi.json", "/problems/{slug}"}


def parts(value: Any) -> Iterator[Any]:
    """Yield a JSON value and all values within it."""
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(inner)


async def test_every_enumeration_is_a_component(document: dict[str, Any]) -> None:
    """Clients have one type for each enumeration: the statuses, the verdicts and all others."""
    schemas = document["components"]["schemas"]
    assert schemas["Status"]["enum"] == list(STATUSES)
    assert schemas["Verdict"]["enum"] == list(VERDICTS)
    assert schemas["Outcome"]["enum"] == [*VERDICTS, "quarantined"]
    named = [one["enum"] for one in schemas.values() if "enum" in one]
    everywhere = [one["enum"] for one in parts(document) if isinstance(one, dict) and "enum" in one]
    assert sorted(everywhere) == sorted(named)


async def test_an_events_data_has_a_schema(document: dict[str, Any]) -> None:
    """The data of an event is a StatusReported, or null."""
    schemas = document["components"]["schemas"]
    for name in ("LogEvent", "OrderEvent"):
        assert schemas[name]["properties"]["data"] == {
            "anyOf": [{"$ref": "#/components/schemas/StatusReported"}, {"type": "null"}]
        }
    data = schemas["StatusReported"]
    assert data["properties"]["verdict"] == {"$ref": "#/components/schemas/Verdict"}
    assert data["properties"]["timestamp"] == {"type": "string", "format": "date-time"}
    assert "repeats_version" in data["required"]
    assert "token_name" not in data["required"]


async def test_no_schema_has_a_member_of_its_own_name(document: dict[str, Any]) -> None:
    """The clients of openapi-python-client use one variable for both, so type checkers reject them."""
    for name, schema in document["components"]["schemas"].items():
        assert re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() not in schema.get("properties", {}), name


async def test_every_response_has_one_type(document: dict[str, Any]) -> None:
    """No response has a choice of media types, and the client never has to send null."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for response in operation["responses"].values():
                assert len(response.get("content", ["none"])) == 1, path
    assert [one for one in parts(document) if isinstance(one, dict) and one.get("default", "") is None] == []


async def test_a_cursor_has_a_pattern(document: dict[str, Any]) -> None:
    """Every cursor in the document has the pattern of cursors."""
    cursors = [one for one in parts(document) if isinstance(one, dict) and one.get("name") == "cursor"]
    assert len(cursors) >= 4
    assert all(one["schema"] == {"type": "string", "pattern": CURSOR_PATTERN} for one in cursors)


def test_the_version_is_that_of_the_project() -> None:
    """The version in pyproject.toml equals that of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == VERSION


# A read of a position that the log does not have yet gets 503.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]

# A read of new events may wait for 30 s. Every other response is due within the usual 10 s.
[[operations]]
include-path = "/events"
checks.max_response_time = 40
"""
# The webhook answers unparseable bodies with 200 on purpose, because a sender would retry a 4xx in vain.
# Besides, a schema cannot express which cursors are valid.
NOT_CHECKED = "negative_data_rejection,positive_data_acceptance"
# Streams never end, so a test cannot wait for their end.
ENDLESS = "/stream$"
REQUEST_SECONDS_MAX = 60


def find_contradictions(service: RunningService, folder: Path, examples_max: int, phases: str) -> str:
    """Run schemathesis on every operation, and return its report if the service contradicts the document."""
    (folder / "schemathesis.toml").write_text(CONFIG, encoding="utf-8")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml"),
        *("run", f"{service.url}/openapi.json", "--phases", phases),
        *("--max-examples", str(examples_max), "--seed", "1", "--checks", "all"),
        *("--exclude-checks", NOT_CHECKED, "--exclude-path-regex", ENDLESS, "--no-color"),
        *("--request-timeout", str(REQUEST_SECONDS_MAX)),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    return "" if done.returncode == 0 else done.stdout[-6_000:] + done.stderr[-2_000:]


def test_the_service_conforms_to_its_document(shared_service: RunningService, tmp_path: Path) -> None:
    """Schemathesis sends valid and invalid examples to every operation, and finds no failure.

    The test takes about 8 s, because schemathesis is a large program.
    """
    assert find_contradictions(shared_service, tmp_path, 1, "examples,fuzzing") == ""


@pytest.mark.long
@pytest.mark.timeout(SECONDS_MAX)
def test_the_service_conforms_to_its_document_at_length(service: RunningService, tmp_path: Path) -> None:
    """Schemathesis finds no failure with many examples of each operation and sequences of operations."""
    assert find_contradictions(service, tmp_path, 50, "examples,coverage,fuzzing,stateful") == ""
