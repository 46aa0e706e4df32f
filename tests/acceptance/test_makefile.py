"""The environment's pip and the audit of ``make lint``, as a developer and CI run them."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.audit import VULNERABLE
from tests.support.folders import ROOT
from tests.support.processes import environment
from tests.support.waiting import PATIENCE_SECONDS

LOCKS: Final = ("requirements.lock", "requirements-dev.lock")
CONTRACT: Final = "tests/support/contract"
PATRONI: Final = "tests/support/patroni"
# The lock's entry of pip: its version and hashes.
PIP: Final = re.compile(r"^pip==(?P<version>\S+) \\\n(?:    --hash=\S+(?: \\)?\n)+", re.MULTILINE)


@pytest.mark.parametrize("name", LOCKS)
def test_the_environment_has_the_pip_of_the_lock(name: str) -> None:
    """Both locks pin pip with its hashes, and the environment has that version."""
    pip = PIP.search((ROOT / name).read_text(encoding="utf-8"))
    assert pip is not None
    assert pip["version"] == version("pip")


@pytest.mark.parametrize("name", [*LOCKS, f"{CONTRACT}/requirements.lock", f"{PATRONI}/requirements.lock"])
def test_the_locks_name_no_registry(name: str) -> None:
    """A lock holds only names, versions, markers and hashes, so that it works with any registry or mirror."""
    lock = (ROOT / name).read_text(encoding="utf-8")
    assert not re.findall(r"://|^-|^\S+ @ ", lock, re.MULTILINE)


def test_the_lock_for_npm_names_no_registry() -> None:
    """The lock for npm has a hash and no address for each package, and package.json pins exact versions."""
    lock = json.loads((ROOT / CONTRACT / "package-lock.json").read_text(encoding="utf-8"))
    root, *packages = lock["packages"].values()
    assert len(packages) > len(root["devDependencies"])
    assert all("integrity" in package and "resolved" not in package for package in packages)
    assert all(re.fullmatch(r"[\d.]+", version) for version in root["devDependencies"].values())


def test_make_installs_the_lock_with_the_pinned_pip(tmp_path: Path) -> None:
    """A new environment's pip is replaced before that pip installs anything else. Both are checked by hash.

    The test takes about 6 s, because it creates an environment and downloads pip.
    """
    lock = tmp_path / "requirements.lock"
    pip = PIP.search((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    assert pip is not None
    # The installation of a second package fails, so that the environment shows what came before it.
    lock.write_text(f"{pip[0]}idna==3.10 --hash=sha256:{0:064}\n", encoding="utf-8")
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    done = subprocess.run(
        ["make", "venv", f"VENV={tmp_path}/.venv", f"LOCK={lock}", f"PYTHON={python}"],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    installed = subprocess.run(
        [tmp_path / ".venv" / "bin" / "python", "-m", "pip", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    if "No matching distribution" in done.stderr:
        pytest.skip("no registry is reachable")
    assert "HASHES" in done.stderr
    assert done.returncode != 0
    assert installed.stdout.split()[1] == pip["version"]


# For each case, the packages that the source reports as vulnerable, the value of CI, and the expected result.
NOTHING: Final = r"osv responds, but audits nothing\naudit: NOTHING WAS AUDITED\n"
CASES: Final = {
    "audited": ((VULNERABLE,), "true", 0, r"audited \d\d packages .* 0 are unknown to it; 0 are vulnerable\n"),
    "vulnerable": ((VULNERABLE, "aiohttp"), "", 1, r"aiohttp \S+ has known vulnerabilities: TEST-1\n"),
    "nothing audited on CI": ((), "true", 1, NOTHING),
    "nothing audited": ((), "", 0, NOTHING),
}


@contextmanager
def osv(vulnerable: tuple[str, ...]) -> Iterator[str]:
    """Serve the query API of OSV for the length of the block, and yield its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            affected = [{"package": query["package"], "ranges": []}]
            is_vulnerable = query["package"]["name"] in vulnerable
            body = {"vulns": [{"id": "TEST-1", "affected": affected}]} if is_vulnerable else {}
            content = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/query"
        finally:
            server.shutdown()
            thread.join()


def audit(url: str, ci: str) -> "subprocess.CompletedProcess[str]":
    """Run the audit of ``make lint`` with another OSV service."""
    return subprocess.run(
        [sys.executable, "-m", "tests.support.audit", url],
        cwd=ROOT,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


@pytest.mark.parametrize(("vulnerable", "ci", "returncode", "output"), CASES.values(), ids=CASES)
def test_the_audit_reports_what_it_audited(
    vulnerable: tuple[str, ...], ci: str, returncode: int, output: str
) -> None:
    """The audit prints its numbers. It fails for a vulnerable package, and on CI if a source audits nothing."""
    with osv(vulnerable) as url:
        done = audit(url, ci)
    assert re.search(output, done.stdout), done.stdout + done.stderr
    assert done.returncode == returncode


def test_the_audit_without_a_source() -> None:
    """If no source is reachable, the audit prints that and succeeds, on CI too."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    done = audit(f"http://127.0.0.1:{port}/v1/query", "true")
    assert "audit: osv is unreachable: " in done.stdout
    assert done.stdout.endswith("\naudit: NOTHING WAS AUDITED\n")
    assert done.returncode == 0
