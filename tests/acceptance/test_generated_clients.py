"""The OpenAPI document passes two linters, and the clients that two generators make from it work.

The programs are pinned in tests/support/contract, and installed from the registries into a temporary folder.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests.support.folders import ROOT, copied_folder, temporary_folder
from tests.support.processes import run_command, running_service

PINNED: Final = ROOT / "tests" / "support" / "contract"
SECONDS_MAX: Final = 600
TOKEN: Final = "a-token-of-this-test-0123456789"  # noqa: S105 - of a service that lives for one test

pytestmark = [pytest.mark.long, pytest.mark.timeout(SECONDS_MAX)]

# Both clients send the same reports and read them. Each prints the same summary.
PYTHON = """\
import sys
from datetime import UTC

from order_tracking_client import AuthenticatedClient
from order_tracking_client.api.events import export_events, list_events
from order_tracking_client.api.orders import export_orders, get_order, get_timeline, list_orders
from order_tracking_client.api.webhook import put_report_with_token
from order_tracking_client.models import CurrentOrder, LogEventPage, OrderPage, Outcome, Problem, Receipt
from order_tracking_client.models import ReportBody, Status, Timeline

url, token, key = sys.argv[1:]
client = AuthenticatedClient(url, token=key)



def send(status: str) -> Receipt:
    body = ReportBody(order_no="KOM/1", status=status, cnote="AWB1")
    receipt = put_report_with_token.sync(token, client=client, body=body)
    assert isinstance(receipt, Receipt)
    return receipt


_, _, receipt = map(send, ("Dikirim", "Dikirim", "Dibatalkan"))
assert (receipt.outcome, receipt.quarantine_id, receipt.ignored) == (Outcome.REFUSED, None, [])
assert receipt.position is not None
at = receipt.position

order = get_order.sync("KOM/1", client=client, after_position=at)
assert isinstance(order, CurrentOrder)
assert order.last_reported_at.tzinfo is not None
timeline = get_timeline.sync("KOM/1", client=client, after_position=at)
assert isinstance(timeline, Timeline)
orders = list_orders.sync(client=client, status=Status.IN_TRANSIT, verdict="refused", limit=1)
assert isinstance(orders, OrderPage)
table = export_orders.sync(client=client)
assert isinstance(table, str)
feed = list_events.sync(client=client, limit=2)
assert isinstance(feed, LogEventPage)
data = feed.events[1].data
assert data is not None
assert (data.recognised, data.timestamp.utcoffset()) == (Status.IN_TRANSIT, UTC.utcoffset(None))
lines = export_events.sync(client=client)
assert isinstance(lines, str)
missing = get_order.sync("KOM2", client=client)
assert isinstance(missing, Problem)
print(
    order.status,
    [(entry.version, str(entry.verdict), entry.repeats) for entry in timeline.entries],
    len(orders.orders), len(table.splitlines()), len(lines.splitlines()), data.repeats_version, missing.title,
    sep="; ",
)
"""
TYPESCRIPT = """\
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

type Schemas = components["schemas"];
declare const process: { argv: string[] };
const [url, token, key] = process.argv.slice(2) as [string, string, string];
const client = createClient<paths>({ baseUrl: url, headers: { Authorization: `Bearer ${key}` } });

function need<T>(value: T | null | undefined): T {
    if (value === null || value === undefined) throw new Error("there is no value");
    return value;
}

let receipt: Schemas["Receipt"] | undefined;
for (const status of ["Dikirim", "Dikirim", "Dibatalkan"]) {
    const body = { order_no: "KOM/1", status, cnote: "AWB1" };
    receipt = (await client.PUT("/webhook/{token}", { params: { path: { token } }, body })).data;
}
const outcome: Schemas["Outcome"] = need(receipt).outcome;
const ignored: string[] = need(receipt).ignored;
if (outcome !== "refused" || need(receipt).quarantine_id !== null || ignored.length) throw new Error(outcome);
const after_position = need(need(receipt).position);

const params = { path: { order_no: "KOM/1" }, query: { after_position } };
const order = need((await client.GET("/orders/{order_no}", { params })).data);
const timeline = need((await client.GET("/orders/{order_no}/timeline", { params })).data);
const query = { status: "in_transit", verdict: "refused", limit: 1 } as const;
const orders: Schemas["OrderPage"] = need((await client.GET("/orders", { params: { query } })).data);
// @ts-expect-error - there is no such verdict
await client.GET("/orders", { params: { query: { verdict: "nowhere" } } });
const table: string = need((await client.GET("/orders.csv", { parseAs: "text" })).data);
const feed = need((await client.GET("/events", { params: { query: { limit: 2 } } })).data);
const next: string = feed.next;
const data = need(feed.events[1]?.data);
const recognised: Schemas["Status"] | null = data.recognised;
if (recognised !== "in_transit" || !data.timestamp.endsWith("Z") || !next) throw new Error(data.timestamp);
const lines: string = need((await client.GET("/events.ndjson", { parseAs: "text" })).data);
const missing = await client.GET("/orders/{order_no}", { params: { path: { order_no: "KOM2" } } });
const entries = timeline.entries.map((one) => `(${one.version}, '${one.verdict}', ${one.repeats})`);
console.log(
    [
        order.status, `[${entries.join(", ")}]`, orders.orders.length, table.trim().split("\\n").length,
        lines.trim().split("\\n").length, data.repeats_version, need(missing.error).title,
    ].join("; "),
);
"""
SUMMARY: Final = "in_transit; [(1, 'advanced', 1), (3, 'refused', 0)]; 1; 2; 3; 1; Unknown order\n"


class Target(NamedTuple):
    """A running service that requires a token and a key."""

    url: str
    key: str

    def arguments(self) -> tuple[str, str, str]:
        """Return the arguments of the client programs."""
        return self.url, TOKEN, self.key


def run(folder: Path, *command: str | Path) -> str:
    """Run a program of the contract's tools, and return its output."""
    done = subprocess.run(
        command,
        cwd=folder,
        # No program may report its use, or look for a newer version of itself.
        env={**os.environ, "REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true"},
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-4_000:]
    return done.stdout


@pytest.fixture(scope="module")
def node_programs() -> Iterator[Path]:
    """Install the programs for Node.js, and yield their folder."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program} here")
    with temporary_folder() as folder:
        for name in ("package.json", "package-lock.json", ".npmrc"):
            shutil.copy(PINNED / name, folder)
        run(folder, "npm", "ci", "--no-audit", "--no-fund")
        yield folder


@pytest.fixture(scope="module")
def python_programs() -> Iterator[Path]:
    """Install the generator of Python clients into its own environment, and yield the folder of programs."""
    with temporary_folder() as folder:
        run(folder, sys.executable, "-m", "venv", "venv")
        options = ("--quiet", "--disable-pip-version-check", "--require-hashes", "--only-binary", ":all:")
        run(folder, "venv/bin/python", "-m", "pip", "install", *options, "-r", PINNED / "requirements.lock")
        yield folder / "venv" / "bin"


@pytest.fixture
def target(state_template: Path) -> Iterator[Target]:
    """Run a service with a webhook token and an API key."""
    with (
        copied_folder(state_template) as state_dir,
        running_service(state_dir, WEBHOOK_TOKENS=TOKEN) as service,
    ):
        key = run_command(state_dir, "keys", "create", "client").stdout.split()[-1]
        yield Target(service.url, key)


@pytest.fixture
def document(target: Target, tmp_path: Path) -> Path:
    """Download the document, and return its file."""
    file = tmp_path / "openapi.json"
    run(tmp_path, "curl", "--silent", "--fail", "--output", file, f"{target.url}/openapi.json")
    return file


def test_two_linters_find_nothing(node_programs: Path, document: Path) -> None:
    """Redocly's recommended rules and Spectral's for OpenAPI find no error and no warning.

    Both do find the faults of a document without servers. The test takes about 20 s, with the installation.
    """
    assert find_problems(node_programs, document) == (set(), set())
    faulty: dict[str, Any] = json.loads(document.read_text(encoding="utf-8"))
    del faulty["servers"]
    document.write_text(json.dumps(faulty), encoding="utf-8")
    assert find_problems(node_programs, document) == ({"no-empty-servers"}, {"oas3-api-servers"})


def find_problems(programs: Path, document: Path) -> tuple[set[str], set[str]]:
    """Return the rules that Redocly and Spectral find broken in a document."""
    redocly = lint(programs, "redocly", "lint", "--extends", "recommended", "--format", "json", document)
    spectral = lint(
        programs, "spectral", "lint", "--quiet", "-r", PINNED / "spectral.yaml", "-f", "json", document
    )
    return {one["ruleId"] for one in redocly["problems"]}, {one["code"] for one in spectral}


def lint(programs: Path, name: str, *arguments: str | Path) -> Any:
    """Run a linter, and return its report. Its exit code only repeats the report."""
    command = (programs / "node_modules" / ".bin" / name, *arguments)
    done = subprocess.run(
        command, cwd=programs, capture_output=True, text=True, timeout=SECONDS_MAX, check=False
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_a_generated_python_client_works(
    python_programs: Path, target: Target, document: Path, tmp_path: Path
) -> None:
    """openapi-python-client generates without a warning; the client has correct types, and its calls succeed.

    The test takes about 60 s, with the installation and the check of all types.
    """
    run(
        tmp_path,
        *(python_programs / "openapi-python-client", "generate", "--path", document, "--meta", "none"),
        *("--config", PINNED / "openapi-python-client.yaml", "--output-path", "order_tracking_client"),
        "--fail-on-warning",
    )
    (tmp_path / "call.py").write_text(PYTHON, encoding="utf-8")
    python = python_programs / "python"
    options = ("--strict", "--python-executable", python)
    run(tmp_path, sys.executable, "-m", "mypy", *options, "order_tracking_client", "call.py")
    assert run(tmp_path, python, "call.py", *target.arguments()) == SUMMARY


def test_a_generated_typescript_client_works(
    node_programs: Path, target: Target, document: Path, tmp_path: Path
) -> None:
    """openapi-typescript generates types that compile strictly, and the calls of openapi-fetch succeed.

    The test takes about 20 s, with the installation.
    """
    (tmp_path / "node_modules").symlink_to(node_programs / "node_modules")
    (tmp_path / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    (tmp_path / "call.ts").write_text(TYPESCRIPT, encoding="utf-8")
    run(tmp_path, "node_modules/.bin/openapi-typescript", document, "--output", "schema.d.ts")
    run(
        tmp_path,
        "node_modules/.bin/tsc",
        "--strict",
        *("--module", "nodenext", "--target", "es2022"),
        "call.ts",
    )
    assert run(tmp_path, "node", "call.js", *target.arguments()) == SUMMARY
