"""The OpenAPI document is valid and complete, and agrees with the running service."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from openapi_spec_validator import OpenAPIV31SpecValidator

from service import VERSION
from service.app import Service
from service.http.problems import ProblemType
from service.settings import Settings
from tests.support.folders import ROOT
from tests.support.processes import RunningService

SECONDS_MAX = 900


@pytest.fixture
async def document(dsn: str) -> dict[str, Any]:
    return Service(Settings(port=0), dsn).openapi.document


async def test_it_is_valid(document: dict[str, Any]) -> None:
    """The document conforms to OpenAPI 3.1, and every operation has a summary."""
    OpenAPIV31SpecValidator(document).validate()
    assert all(operation["summary"] for path in document["paths"].values() for operation in path.values())


async def test_it_has_every_route(dsn: str, document: dict[str, Any]) -> None:
    """The document has exactly the routes of the service, except pages."""
    service = Service(Settings(port=0), dsn)
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in service.make_app(65_536).router.routes()
        if isinstance(route, web.ResourceRoute) and route.method != "HEAD" and route.resource is not None
    }
    # The webhook's handler checks the method itself.
    routes = routes - {("*", "/webhook"), ("*", "/webhook/")} | {("put", "/webhook"), ("post", "/webhook")}
    told = {(method, path) for path, operations in document["paths"].items() for method in operations}
    pages = {route for route in routes - told if re.match(PAGES, route[1])}
    assert routes - pages == told


# HTML pages are not a part of the contract.
PAGES = r"/$|/(static|track|quarantined|operations|session|overview|metrics)\b"


async def test_every_problem_belongs_to_an_operation(document: dict[str, Any]) -> None:
    """Every problem type, except for bad framing, belongs to at least one operation."""
    told = {
        title
        for operations in document["paths"].values()
        for operation in operations.values()
        for answer in operation["responses"].values()
        for title in re.findall(r"(\w[\w ]*) \(`(?:/problems/|about:blank)", answer["description"])
    }
    assert told == {kind.title for kind in ProblemType} - {ProblemType.BAD_FRAMING.title}


async def test_an_operation_lists_only_its_own_problems(document: dict[str, Any]) -> None:
    """An operation lists only the problems that it can return."""
    paths = document["paths"]
    assert "404" not in paths["/orders"]["get"]["responses"]
    assert "Unknown entry" not in paths["/orders/{order_no}"]["get"]["responses"]["404"]["description"]
    assert "Bad parameter" not in paths["/webhook"]["put"]["responses"]["400"]["description"]


async def test_a_success_is_described_by_its_declaration(document: dict[str, Any]) -> None:
    """Each 200 has the docstring of its type, or the summary if the type is one of Python's own."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            description = operation["responses"]["200"]["description"]
            assert description.endswith("."), path
            assert not description.startswith(("dict(", "str(")), path


def test_the_version_is_that_of_the_project() -> None:
    """The version in pyproject.toml equals that of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == VERSION


# A read of a position that the log does not have yet gets 503.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]
"""
# The webhook answers unparseable bodies with 200 on purpose, because a sender would retry a 4xx in vain.
# Besides, a schema cannot express which cursors are valid.
NOT_CHECKED = "negative_data_rejection,positive_data_acceptance"
# Streams never end, so a test cannot wait for their end.
ENDLESS = "/stream$"


def find_contradictions(service: RunningService, folder: Path, examples_max: int, phases: str) -> str:
    """Run schemathesis on every operation, and return its report if the service contradicts the document."""
    (folder / "schemathesis.toml").write_text(CONFIG, encoding="utf-8")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml"),
        *("run", f"{service.url}/openapi.json", "--phases", phases),
        *("--max-examples", str(examples_max), "--seed", "1", "--checks", "all"),
        *("--exclude-checks", NOT_CHECKED, "--exclude-path-regex", ENDLESS, "--no-color"),
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
