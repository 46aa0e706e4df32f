"""The OpenAPI document: valid, complete, and true of the running service."""

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
    """It is valid by the specification of OpenAPI 3.1, and every operation has a summary."""
    OpenAPIV31SpecValidator(document).validate()
    assert all(operation["summary"] for path in document["paths"].values() for operation in path.values())


async def test_it_has_every_route(dsn: str, document: dict[str, Any]) -> None:
    """Nothing that the service answers is left out, and nothing is told that it does not answer."""
    service = Service(Settings(port=0), dsn)
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in service.make_app(65_536).router.routes()
        if isinstance(route, web.ResourceRoute) and route.method != "HEAD" and route.resource is not None
    }
    # Whose handler tells the methods apart.
    routes = routes - {("*", "/webhook")} | {("put", "/webhook"), ("post", "/webhook")}
    told = {(method, path) for path, operations in document["paths"].items() for method in operations}
    pages = {route for route in routes - told if re.match(PAGES, route[1])}
    assert routes - pages == told


# What is drawn for people is no part of the contract.
PAGES = r"/$|/(static|track|quarantined|session|overview|metrics)\b"


async def test_every_problem_is_told_of_some_endpoint(document: dict[str, Any]) -> None:
    """A kind that no operation can be answered with is explained for nothing. Framing is of none."""
    told = {
        title
        for operations in document["paths"].values()
        for operation in operations.values()
        for answer in operation["responses"].values()
        for title in re.findall(r"(\w[\w ]*) \(`(?:/problems/|about:blank)", answer["description"])
    }
    assert told == {kind.title for kind in ProblemType} - {ProblemType.BAD_FRAMING.title}


async def test_an_operation_tells_its_own_problems_only(document: dict[str, Any]) -> None:
    """A read without an order number in its path is never said to be 404; the webhook knows no parameter."""
    paths = document["paths"]
    assert "404" not in paths["/orders"]["get"]["responses"]
    assert "Unknown entry" not in paths["/orders/{order_no}"]["get"]["responses"]["404"]["description"]
    assert "Bad parameter" not in paths["/webhook"]["put"]["responses"]["400"]["description"]


def test_the_version_is_that_of_the_project() -> None:
    """It is written down twice, and the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == VERSION


# A position that the log does not have yet is 503.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]
"""
# What the webhook cannot understand is answered 200 on purpose: a 4xx would be retried in vain. And no schema
# tells which cursors were given by an earlier answer.
NOT_CHECKED = "negative_data_rejection,positive_data_acceptance"
# The streams have no end to wait for.
ENDLESS = "/stream$"


def find_contradictions(service: RunningService, folder: Path, examples_max: int, phases: str) -> str:
    """Let schemathesis try every operation, and return its report if the service contradicts the document."""
    (folder / "schemathesis.toml").write_text(CONFIG, encoding="utf-8")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml"),
        *("run", f"{service.url}/openapi.json", "--phases", phases),
        *("--max-examples", str(examples_max), "--seed", "1", "--checks", "all"),
        *("--exclude-checks", NOT_CHECKED, "--exclude-path-regex", ENDLESS, "--no-color"),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    return "" if done.returncode == 0 else done.stdout[-6_000:] + done.stderr[-2_000:]


def test_the_service_does_what_it_says(shared_service: RunningService, tmp_path: Path) -> None:
    """Schemathesis sends every operation valid and invalid examples, and finds no failure.

    It takes about 8 s: schemathesis is a large program.
    """
    assert find_contradictions(shared_service, tmp_path, 1, "examples,fuzzing") == ""


@pytest.mark.long
@pytest.mark.timeout(SECONDS_MAX)
def test_the_service_does_what_it_says_at_length(service: RunningService, tmp_path: Path) -> None:
    """With many examples of each operation, and sequences of them."""
    assert find_contradictions(service, tmp_path, 50, "examples,coverage,fuzzing,stateful") == ""
