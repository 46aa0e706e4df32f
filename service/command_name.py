"""The command that runs this program, for hints that you can paste into a shell."""

import shutil
import sys
from pathlib import Path
from shlex import quote
from typing import Final

NAME: Final = "order-tracking"


def command_name() -> str:
    """Return the program's name if it is on the PATH, otherwise a path or a command that works here."""
    if shutil.which(NAME):
        return NAME
    # Make writes it beside the environment's Python.
    script = Path(sys.executable).with_name(NAME)
    if not script.exists():
        return f"{quote(sys.executable)} -m service"
    clone = script.parent.parent.parent
    return quote(str(script.relative_to(clone) if _is_current(clone) else script))


def _is_current(folder: Path) -> bool:
    try:
        return Path.cwd() == folder
    except OSError:  # it was removed
        return False
