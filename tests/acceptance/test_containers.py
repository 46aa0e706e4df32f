"""The files for containers, as far as a machine without a container runtime can test them.

They parse, their paths exist, and their commands run in a folder that has the image's files alone.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml  # type: ignore[import-untyped]
from dotenv import dotenv_values

from service.features.settings import Settings
from tests.support.folders import ROOT, temporary_folder
from tests.support.image import context_files, copy_into, is_ignored, read_image, read_patterns
from tests.support.processes import RunningService, ended_service, environment
from tests.support.waiting import PATIENCE_SECONDS

OPERATIONS: Final = ROOT / "docs" / "operations"
GUIDE: Final = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
COMPOSE_FILE: Final = OPERATIONS / "compose.yaml"
COMPOSE: Final[dict[str, Any]] = yaml.safe_load(COMPOSE_FILE.read_text(encoding="utf-8"))
SERVICES: Final[dict[str, Any]] = COMPOSE["services"]
IMAGE: Final = read_image((OPERATIONS / "Containerfile").read_text(encoding="utf-8"))
COMMIT: Final = "c0ffee" * 6 + "c0de"
# The variables that compose takes from .env or from the shell.
VARIABLES: Final = re.compile(r"(?<!\$)\$\{(\w+)")
# Files that may be in your folder, and must not be in the image.
PRIVATE: Final = (
    *(".env", "docs/operations/.env", "service/.env", ".git/config", ".git", ".venv/bin/python", ".ssh/id_rsa"),
    *("service/__pycache__/app.cpython-312.pyc", "domain/order.pyc", "tracking.dump", "tests/conftest.py"),
)


def first_start() -> str:
    """Return the documented commands of the first start."""
    section = GUIDE.partition("\n### Containers\n")[2]
    return str(re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[0])


def test_the_image_gets_its_files_and_no_secret() -> None:
    """The build context has the code and the lock, and nothing that the image does not need."""
    files = set(context_files())
    assert {path.partition("/")[0] for path in files} == {
        *("Makefile", "requirements.lock", "schema.sql", "pyproject.toml", "domain", "projections", "service")
    }
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "domain", "projections", "service"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert set(tracked) <= files
    patterns = read_patterns((ROOT / ".dockerignore").read_text(encoding="utf-8"))
    assert [path for path in PRIVATE if not is_ignored(path, patterns)] == []


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """Make the image's folder: the copied files, the real make target, and the commands after it.

    Only the packages are not downloaded: the environment borrows those of the tests. It takes about 5 s to make
    that environment.
    """
    with temporary_folder() as root:
        folder = root / IMAGE.folder.strip("/")
        folder.mkdir(parents=True)
        for parent in (folder, *folder.parents):
            if parent == root:
                break
            parent.chmod(0o755)
        copy_into(folder, IMAGE, [*context_files()])
        install, *others = [command for command in IMAGE.commands if not command.startswith("apt-get")]
        assert install == "make .venv/run.stamp"
        names = {**os.environ, "COMMIT": COMMIT}
        run = subprocess.run(
            [*install.split(), "PIP_INSTALL=true", f"PYTHON={sys.executable}"],
            cwd=folder,
            env=names,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        (packages,) = (folder / ".venv" / "lib").glob("python*/site-packages")
        paths = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "of_the_tests.pth").write_text("\n".join(paths), encoding="utf-8")
        for command in others:
            subprocess.run(["sh", "-ec", command], cwd=folder, env=names, check=True)
        yield root


@pytest.fixture
def container(image: Path, owner_dsn: str, tmp_path: Path) -> Iterator[RunningService]:
    """Run the image's command as compose does, with another database, folder and port."""
    documented = dict(re.findall(r"(\w+)=(\S+)", " ".join(first_values())))
    settings = {**IMAGE.variables, **documented, **SERVICES["tracking"]["environment"]}
    chosen = {
        name.removeprefix("ORDER_TRACKING_"): value
        for name, value in settings.items()
        if name.startswith("ORDER_TRACKING_")
    }
    chosen |= {"DATABASE_URL": owner_dsn, "HOST": "127.0.0.1", "LOG_FORMAT": "human"}
    del chosen["STATE_DIR"]
    service = RunningService(tmp_path, **chosen)
    service.command = (f"{image}{IMAGE.entrypoint[0]}",)
    assert (len(IMAGE.entrypoint), IMAGE.arguments) == (1, ["serve"])
    with ended_service(service) as running:
        yield running


def first_values() -> list[str]:
    """Run the documented command that writes .env, and return its lines."""
    with temporary_folder() as folder:
        (command,) = re.findall(r"^\(umask.*?>\.env\)$", first_start(), re.MULTILINE | re.DOTALL)
        subprocess.run(["sh", "-ec", command], cwd=folder, check=True)
        assert (folder / ".env").stat().st_mode & 0o777 == 0o600
        return [f"{name}={value}" for name, value in dotenv_values(folder / ".env").items()]


def read(service: RunningService, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(f"{service.url}{path}", method=method, headers=headers)  # noqa: S310 - our own
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:  # noqa: S310
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def run_in(image: Path, service: RunningService, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in the container, as ``docker compose exec`` does."""
    path = IMAGE.variables["PATH"].replace("/srv", f"{image}/srv").replace("$PATH", os.environ["PATH"])
    names = environment(service.state_dir, **service.settings) | {"PATH": path}
    # The program is found on the path of the image, not of this process.
    program = shutil.which(command[0], path=path)
    assert program is not None
    assert program.startswith(str(image)), program
    return subprocess.run(
        [program, *command[1:]],
        env=names,
        cwd=service.state_dir,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the documented command uses openssl")
def test_the_image_runs_as_documented(container: RunningService, image: Path) -> None:
    """The image serves, its health check follows /readyz, and the documented commands create the first key.

    The test takes about 8 s, because it makes an environment and starts several processes.
    """
    status, body = read(container, "/livez")
    assert (status, json.loads(body)["commit"]) == (200, COMMIT)
    kind, *check = SERVICES["tracking"]["healthcheck"]["test"]
    assert kind == "CMD"
    assert "8080" in check[-1]
    check[-1] = check[-1].replace("8080", str(container.port))
    assert run_in(image, container, *check).returncode == 0
    # Neither the webhook nor the API is open.
    assert read(container, "/webhook", "PUT")[0] == 404
    assert read(container, "/orders")[0] == 401
    commands = re.findall(r"^docker compose exec tracking (order-tracking .*)$", first_start(), re.MULTILINE)
    assert len(commands) == 2
    created, checked = [run_in(image, container, *command.split()) for command in commands]
    assert created.returncode == 0, created.stderr
    key = created.stdout.strip()
    assert read(container, "/orders", Authorization=f"Bearer {key}")[0] == 200
    # The databases of the tests do not survive a crash, which is the only fault.
    faults = [line for line in checked.stdout.splitlines() if line.startswith("WRONG")]
    assert [line for line in faults if "fsync" not in line and "full_page_writes" not in line] == []
    assert "valid tokens: 1" in checked.stdout
    container.terminate()
    assert run_in(image, container, *check).returncode != 0


def test_compose_names_existing_files_and_settings() -> None:
    """Every path, setting, volume and dependency of the file exists, and every variable is documented."""
    build = SERVICES["tracking"]["build"]
    context = (OPERATIONS / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).is_file()
    containerfile = (context / build["dockerfile"]).read_text(encoding="utf-8")
    for argument in build["args"]:
        assert f"\nARG {argument}=" in containerfile
    for name in (*SERVICES["tracking"]["environment"], *IMAGE.variables):
        assert name == "PATH" or name.removeprefix("ORDER_TRACKING_").lower() in Settings.model_fields, name
    for service in SERVICES.values():
        assert set(service.get("depends_on", ())) <= set(SERVICES)
        for dependency, options in service.get("depends_on", {}).items():
            assert options["condition"] == "service_healthy"
            assert "healthcheck" in SERVICES[dependency]
        volumes = {volume.partition(":")[0] for volume in service.get("volumes", ())}
        assert volumes <= set(COMPOSE["volumes"])
    written = COMPOSE_FILE.read_text(encoding="utf-8")
    assert set(VARIABLES.findall(written)) == {"COMMIT", "POSTGRES_PASSWORD"}
    assert all(f"{name}=" in first_start() for name in ("COMMIT", "POSTGRES_PASSWORD"))
    assert (SERVICES["tracking"]["env_file"], "cd docs/operations" in first_start()) == (".env", True)
    ignored = ["git", "check-ignore", "--quiet", "docs/operations/.env"]
    assert subprocess.run(ignored, cwd=ROOT, check=False).returncode == 0


def test_compose_exposes_nothing_and_pins_its_images() -> None:
    """Only this machine reaches the service, only the service the database, and images have a version."""
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"tracking": ["127.0.0.1:8080:8080"]}
    images = {name: service["image"] for name, service in SERVICES.items() if "build" not in service}
    for name, image in images.items():
        assert re.fullmatch(r"docker\.io/[a-z/]+:\d+(\.\d+)+(@sha256:[0-9a-f]{64})?", image), name
    assert {name for name, service in SERVICES.items() if "profiles" in service} == {"tunnel"}
    assert all(service["restart"] == "unless-stopped" for service in SERVICES.values())
    (network,) = COMPOSE["networks"]["default"]["ipam"]["config"]
    assert SERVICES["tracking"]["environment"]["ORDER_TRACKING_TRUSTED_PROXIES"] == network["subnet"]


def test_compose_reads_the_file_as_meant() -> None:
    """Docker's own parser accepts the file, with the tunnel and without it."""
    docker = shutil.which("docker")
    if (
        docker is None
        or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this machine has no docker compose")
    with temporary_folder() as folder:
        (folder / ".env").write_text("POSTGRES_PASSWORD=secret\n", encoding="utf-8")
        shutil.copy(COMPOSE_FILE, folder)
        for profile in ([], ["--profile", "tunnel"]):
            command = [docker, "compose", *profile, "config", "--format", "json"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert ("tunnel" in json.loads(done.stdout)["services"]) == bool(profile)
