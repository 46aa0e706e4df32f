import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.running import RunningService
from tests.conftest import make_folder


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """A state folder of this test's own, which PostgreSQL's own user can reach."""
    folder = make_folder()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def service(state_dir: Path) -> Iterator[RunningService]:
    """A running service."""
    service = RunningService(state_dir)
    service.start()
    yield service
    service.end()
