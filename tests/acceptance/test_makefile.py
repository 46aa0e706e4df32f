"""The environment that make creates, as a developer and CI use it."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Final

import pytest

from tests.support.folders import ROOT
from tests.support.processes import environment

LOCKS: Final = ("requirements.lock", "requirements-dev.lock")
# The lock's entry of pip: its version and hashes.
PIP: Final = re.compile(r"^pip==(?P<version>\S+) \\\n(?:    --hash=\S+(?: \\)?\n)+", re.MULTILINE)


@pytest.mark.parametrize("name", LOCKS)
def test_the_environment_has_the_pip_of_the_lock(name: str) -> None:
    """Both locks pin pip with its hashes, and the environment has that version."""
    pip = PIP.search((ROOT / name).read_text(encoding="utf-8"))
    assert pip is not None
    assert pip["version"] == version("pip")


@pytest.mark.parametrize("name", LOCKS)
def test_the_locks_name_no_registry(name: str) -> None:
    """A lock holds only names, versions, markers and hashes, so that it works with any registry or mirror."""
    lock = (ROOT / name).read_text(encoding="utf-8")
    assert not re.findall(r"://|^-|^\S+ @ ", lock, re.MULTILINE)


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
