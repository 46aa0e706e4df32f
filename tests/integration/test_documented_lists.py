"""Every list of names in the documentation is the code's: tables, settings, problems, members, files."""

import asyncio
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Final, NamedTuple

import pytest

from projections.views import LOG_SQL, VIEWS
from service.api.events import EventsQuery
from service.api.freshness import AGE_HEADER, POSITION_HEADER
from service.api.orders import OrdersQuery
from service.app import Service
from service.cli.main import COMMANDS
from service.database.api_keys import SCOPES
from service.event_log.codec import StatusReported
from service.features import SWITCHED, load_all
from service.features.proofs.api import VERIFY_PY, ProofQuery
from service.features.settings import Settings
from service.features.subscriptions.api import AddRequest
from service.features.subscriptions.message import OrderData
from service.features.subscriptions.subscription import Subscription
from service.http.budgets import Budgets
from service.http.problems import Explained, ProblemType
from service.ingest.refusals import CAUSES
from tests.faults.faults import FAULTS
from tests.support.folders import ROOT

pytestmark = pytest.mark.usefixtures("all_features")

PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES: Final = [
    file for file in sorted((ROOT / "docs" / "operations").iterdir()) if not file.name.startswith(".")
]
SPAN: Final = r"`([^`]+)`"
# Read by the service before its settings.
ENV_FILE: Final = "ORDER_TRACKING_ENV_FILE"


class Table(NamedTuple):
    """A table of a page: the page's name, the table's section, its number there, and its rows."""

    page: str
    section: str
    number: int
    rows: list[list[str]]

    @property
    def key(self) -> str:
        return f"{self.page} / {self.section} / {self.number}"

    def names(self, column: int, pattern: str) -> set[str]:
        return {name for row in self.rows for name in re.findall(pattern, row[column])}


def tables() -> dict[str, Table]:
    """Return every table of the documentation by its key."""
    found: dict[str, Table] = {}
    for page in PAGES:
        prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for section in re.split(r"(?m)^#+ ", prose)[1:]:
            title = section.splitlines()[0].replace("`", "")
            for number, rows in enumerate(re.findall(r"(?m)^\|.*\n\|-.*\n((?:\|.*\n)*)", section)):
                cells = [re.split(r" ?\| ?", row.strip())[1:-1] for row in rows.splitlines()]
                table = Table(page.name, title, number, cells)
                found[table.key] = table
    return found


TABLES: Final = tables()


@cache
def openapi_paths() -> dict[str, Any]:
    async def read() -> dict[str, Any]:
        service = Service(Settings(port=0), "postgresql:///never")
        await service.enter([*SWITCHED])
        return service.openapi.document["paths"]  # type: ignore[no-any-return]

    # In a thread, since the test may run in an event loop.
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(asyncio.run, read()).result()


def problem_types() -> Iterator[Explained]:
    yield from ProblemType
    for _, problems in load_all("problems"):
        yield from problems


def schema_tables() -> set[str]:
    return {*re.findall(r"(?m)^CREATE TABLE (\w+)", LOG_SQL), *(view.name for view in VIEWS)}


def alerts() -> set[str]:
    return set(re.findall(r"alert: (\w+)", (ROOT / "docs/operations/alerts.yaml").read_text(encoding="utf-8")))


def reader_causes() -> set[str]:
    text = (ROOT / "service" / "api" / "health.py").read_text(encoding="utf-8")
    return set(re.findall(r'cause="(\w+)"', text))


def below(prefix: str) -> set[str]:
    """Return each method and path of the API below a path."""
    return {
        f"{method.upper()} {path}"
        for path, operations in openapi_paths().items()
        if path.startswith(prefix)
        for method in operations
    }


def _module(break_it: Any) -> str:
    return str(getattr(break_it, "func", break_it).__module__).rpartition(".")[2]


def variables() -> set[str]:
    texts = (file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    return {name for text in texts for name in re.findall(r"environ[^\n]*\"(TEST_[A-Z_]+)\"", text)}


# The tables that list names: the column, the pattern of a name in it, and the same names from the code.
LISTS: Final[dict[str, tuple[int, str, Callable[[], set[str]]]]] = {
    "operations.md / Stored data / 0": (1, SPAN, schema_tables),
    "operations.md / Budgets / 0": (0, r"^`(\w+)`", lambda: {budget.name for budget in Budgets()}),
    "operations.md / Monitoring / 0": (0, r"\w+", alerts),
    "operations.md / Why webhooks are refused / 0": (0, SPAN, lambda: {*CAUSES}),
    "operations.md / Readers / 0": (0, SPAN, lambda: reader_causes() - {*CAUSES}),
    "api.md / Your own writes / 0": (0, SPAN, lambda: {POSITION_HEADER, AGE_HEADER}),
    "api.md / Authentication / 0": (0, SPAN, lambda: {*SCOPES}),
    "api.md / Problems / 0": (1, r"`(/.+)`", lambda: {one.uri for one in problem_types()} - {"about:blank"}),
    # The text before the table names the others.
    "api.md / GET /orders / 0": (
        *(0, SPAN),
        lambda: (
            {*OrdersQuery.model_fields} - {"sort", "verdict", "after_position", "cursor", "limit"}
            | {f"verdict={verdict}" for verdict in ("refused",)}
        ),
    ),
    "api.md / GET /events / 0": (
        *(0, SPAN),
        lambda: {*EventsQuery.model_fields} - {"after", "last", "log", "limit", "wait"},
    ),
    "api.md / GET /events / 1": (0, SPAN, lambda: {*StatusReported.__annotations__}),
    "api.md / GET /orders/{order_no}/proof / 0": (0, SPAN, lambda: {*ProofQuery.model_fields}),
    "api.md / GET /history/... / 0": (0, SPAN, lambda: {path.split()[1] for path in below("/history/")}),
    "api.md / Subscriptions / 0": (0, SPAN, lambda: below("/subscriptions")),
    "api.md / Subscriptions / 1": (0, SPAN, lambda: {*AddRequest.model_fields}),
    "api.md / Subscriptions / 2": (0, SPAN, lambda: {*Subscription.__annotations__}),
    "integrations.md / Add a subscription / 0": (
        *(1, r"`\"?(\w+)"),
        lambda: {*AddRequest.model_fields} - {"url"},
    ),
    "integrations.md / The messages / 0": (0, SPAN, lambda: {*OrderData.__annotations__}),
    "proof.md / Verify a proof / 0": (
        *(0, r"(--\w+)"),
        lambda: {*re.findall(r'add_argument\("(--\w+)"', VERIFY_PY.read_text(encoding="utf-8"))} - {"--key"},
    ),
    "settings.md / Features / 0": (0, SPAN, lambda: {*SWITCHED}),
    "settings.md / Settings / 0": (
        *(0, r"ORDER_TRACKING_(\w+)"),
        lambda: {name.upper() for name in Settings.model_fields},
    ),
    "testing.md / Where your test belongs / 0": (
        *(0, r"`tests/(\w+)/`"),
        lambda: {file.parent.name for file in (ROOT / "tests").glob("*/__init__.py")},
    ),
    "testing.md / The fault harness / 0": (
        *(0, r"`(\w+)\.py`"),
        # It runs apart from the others.
        lambda: {_module(fault.break_it) for fault in FAULTS} | {"deliveries"},
    ),
    "testing.md / Settings / 0": (0, SPAN, variables),
}
# The others explain, compare or measure: by page, or by page and section. Other tests compare those of
# statuses.md, and the Indonesian half of the README.
OTHERS: Final = (
    *("README.id.md", "SECURITY.md", "scaling.md", "statuses.md"),
    *("README.md / Why not", "README.md / The API", "README.md / Speed", "README.md / Settings"),
    *("architecture.md / Glossary", "integrations.md / Subscription or feed?", "integrations.md / Retries"),
    *("operations.md / Several services", "operations.md / Database roles"),
    *("operations.md / Copies of erased data", "operations.md / How much", "operations.md / Automatic"),
    *("operations.md / Moving to another server", "operations.md / Troubleshooting"),
    *("proof.md / Provable history", "proof.md / Threats", "proof.md / Cost", "proof.md / Formats"),
    "testing.md / The fault harness / 1",
)


@pytest.mark.parametrize("key", LISTS)
async def test_a_list_is_that_of_the_code(key: str) -> None:
    """A table of the documentation has the names of the code: no more, and no fewer."""
    column, pattern, expected = LISTS[key]
    assert TABLES[key].names(column, pattern) == expected()


def test_every_table_is_compared_or_explains() -> None:
    """A new table of the documentation is compared with the code, or has an entry among those that are not."""
    assert [key for key in TABLES if key not in LISTS and not key.startswith(OTHERS)] == []


async def test_every_path_is_documented() -> None:
    """The API's page has each path of the API, and the README names no other."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [path for path in openapi_paths() if path not in page] == []
    named = TABLES["README.md / The API / 0"].names(0, r"(/[^`\s]*)")
    assert named - {*openapi_paths(), "/"} == set()


def test_every_setting_exists() -> None:
    """Pages and files for operators name only settings that there are."""
    known = {f"ORDER_TRACKING_{name.upper()}" for name in Settings.model_fields} | {ENV_FILE}
    for file in (*PAGES, *FILES):
        named = re.findall(r"ORDER_TRACKING_[A-Z][A-Z_]+[A-Z]", file.read_text(encoding="utf-8"))
        assert {*named} - known == set(), file


def test_every_command_and_every_table_exists() -> None:
    """What a page has you run is a command, and what it has you query is a table of the schema."""
    commands, names = dict(COMMANDS), schema_tables() | set(re.findall(r"FUNCTION (\w+)", LOG_SQL))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        run = re.findall(r"(?:`|^ *|&& |\| |=\S+ )order-tracking (?!is )([a-z][a-z-]+)", text, re.MULTILINE)
        assert {*run} - {*commands} == set(), page
        assert {*re.findall(r"\bpublic\.(\w+)", text)} - names == set(), page


def test_every_file_is_described() -> None:
    """Each file for operators is named on a page, and each link of a page leads to a file."""
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    assert [file.name for file in FILES if not any(file.name in text for text in texts.values())] == []
    for page, text in texts.items():
        links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
        assert [link for link in links if not (page.parent / link).exists()] == [], page
