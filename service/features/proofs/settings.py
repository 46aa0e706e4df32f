"""The settings of proofs."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from service.settings import CoreSettings


def _check_origin(origin: str) -> str:
    if not origin.isprintable() or " " in origin or "+" in origin:
        raise ValueError(f"{origin!r} has a space or a plus. Expected a name such as shop.example/orders")
    return origin


def _check_key_file(path: Path | None) -> Path | None:
    if path is not None and path.suffix == ".signed":
        raise ValueError(
            f"{path} ends with .signed, as the key's guard does. Expected a name such as history.key"
        )
    return path and path.expanduser().absolute()


class ProofsSettings(CoreSettings):
    """The settings of proofs."""

    history_key_file: Annotated[Path | None, AfterValidator(_check_key_file)] = None
    """the file of the key that signs the history; empty for history.key in STATE_DIR"""
    history_origin: Annotated[str, AfterValidator(_check_origin)] = ""
    """the name of the history for a new key, such as shop.example/orders; empty for a random one"""
    history_public: bool = False
    """whether the history's checkpoint, keys, tiles and verifiers need no API key"""

    @property
    def history_key(self) -> Path:
        """The file of the key that signs the history."""
        return self.history_key_file or self.state_dir / "history.key"
