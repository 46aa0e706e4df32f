"""Imports have no side effects, and follow the rules that the contracts in pyproject.toml cannot state."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("domain", "projections", "service", "tests")

# The code of a separate process. Its hook rejects every action beyond the process, and then it imports
# everything.
IMPORT_EVERYTHING = """
import importlib, sys, threading

FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.fork", "os.mkdir", "os.remove", "os.rename", "shutil.")

def hook(event, args):
    if event.startswith(FORBIDDEN) or (event == "open" and args[1] and set(args[1]) & set("wax+")):
        raise AssertionError(f"an import does {event} {args}")

third_party, modules = (names.split(",") for names in sys.argv[1:])
for name in third_party:
    importlib.import_module(name)
sys.addaudithook(hook)
for name in modules:
    importlib.import_module(name)
assert threading.active_count() == 1, threading.enumerate()
"""


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def imported_by(path: Path) -> set[str]:
    """Return the full names of all modules that a source imports, at any level of nesting."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            names.add(node.module)
            # ``from service import app`` imports a module too.
            if package_name(node.module) in OURS:
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def package_name(name: str) -> str:
    return name.partition(".")[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", sources("domain"), ids=module_name)
def test_the_domain_has_no_clock(path: Path) -> None:
    """The domain never reads the clock.

    Import contracts cannot check that, because the domain needs the type datetime.
    """
    calls = {
        node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)
    }
    assert calls & {"now", "utcnow", "today", "create_timestamp"} == set()


def test_no_test_module_imports_another() -> None:
    """Tests share fixtures through conftest.py, and everything else through tests/support."""
    for path in sources("tests"):
        imported = {name.rpartition(".")[2] for name in imported_by(path) if package_name(name) == "tests"}
        assert not {name for name in imported if name.startswith("test_")}, path


def test_importing_opens_nothing() -> None:
    """Importing the project's modules opens no connection, starts no process or thread, and writes no file."""
    paths = [path for package in ("domain", "projections", "service") for path in sources(package)]
    modules = sorted({module_name(path) for path in paths})
    third_party = sorted(
        name
        for name in {name for path in paths for name in imported_by(path)}
        if package_name(name) not in OURS
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_EVERYTHING, ",".join(third_party), ",".join(modules)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
