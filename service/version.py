"""The version of this release, as pyproject.toml has it; a test holds the two together."""

from typing import Final

VERSION: Final = "0.1.0"
