"""Who may import whom, read from the source itself, and what an import may not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("domain", "projections", "service", "tests")

# For a process of its own: a hook that names whatever reaches beyond the process, then all the imports.
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
    """The full names of all modules that a source imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            names.add(node.module)
            # ``from service import parser`` imports a module too.
            if node.module in OURS:
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def package_of(name: str) -> str:
    return name.partition(".")[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", sources("domain"), ids=module_name)
def test_the_domain_is_pure(path: Path) -> None:
    """It imports the standard library, eventsourcing.domain, eventsourcing.utils and itself."""
    for name in imported_by(path):
        assert (
            package_of(name) in sys.stdlib_module_names
            or package_of(name) == "domain"
            or name in ("eventsourcing.domain", "eventsourcing.utils")
        ), name


@pytest.mark.parametrize("path", sources("domain"), ids=module_name)
def test_the_domain_has_no_clock_and_no_io(path: Path) -> None:
    """Of the standard library it takes nothing that gives another answer each time; no clock is named."""
    reaching_out = {
        "asyncio",
        "io",
        "os",
        "pathlib",
        "random",
        "secrets",
        "socket",
        "subprocess",
        "time",
        "uuid",
    }
    assert {package_of(name) for name in imported_by(path)} & (reaching_out | {"logging"}) == set()
    calls = {
        node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)
    }
    assert calls & {"now", "utcnow", "today", "create_timestamp"} == set()


@pytest.mark.parametrize("path", sources("projections"), ids=module_name)
def test_projections_know_nothing_of_the_service(path: Path) -> None:
    """They import the domain and themselves, of what is ours."""
    ours = {package_of(name) for name in imported_by(path)} & set(OURS)
    assert ours <= {"domain", "projections"}


@pytest.mark.parametrize("package", ["domain", "projections", "service"])
def test_nothing_that_is_shipped_imports_the_tests(package: str) -> None:
    """And nothing but the service, and the tests, imports the service."""
    for path in sources(package):
        packages = {package_of(name) for name in imported_by(path)}
        assert "tests" not in packages, path
        assert package == "service" or "service" not in packages, path


def test_no_test_module_imports_another() -> None:
    """Tests share fixtures through conftest.py, and everything else through tests/support."""
    for path in sources("tests"):
        imported = {name.rpartition(".")[2] for name in imported_by(path) if package_of(name) == "tests"}
        assert not {name for name in imported if name.startswith("test_")}, path


def test_importing_opens_nothing() -> None:
    """No import of ours opens a connection, starts a process or a thread, or writes a file."""
    paths = [path for package in ("domain", "projections", "service") for path in sources(package)]
    modules = sorted({module_name(path) for path in paths})
    third_party = sorted(
        name for name in {name for path in paths for name in imported_by(path)} if package_of(name) not in OURS
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
