"""The printed report: the machine, and a row for each measurement."""

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH_CHARACTERS: Final = 132
NO_TARGET: Final = "-"

out = Console(width=WIDTH_CHARACTERS, highlight=False)


class Row(NamedTuple):
    """A measurement.

    Args:
        what: the measured quantity.
        measured: the value with its unit; ``x`` for a ratio.
        to_reach: the target, in the same form.
        is_met: whether the target was reached; None if the measurement is invalid.
        figures: the absolute values behind the result.
    """

    what: str
    measured: str
    to_reach: str
    is_met: bool | None
    figures: str

    def unless(self, fault: str | None) -> "Row":
        """Return this row, or an invalid one that names the fault, if there is one."""
        return self if fault is None else self._replace(measured="-", is_met=None, figures=fault)


def ratio(what: str, measured: float, figures: str, *, least: float = 0, most: float = 0) -> Row:
    """Return a row whose target is a minimum or a maximum ratio."""
    is_met = measured >= least if least else measured <= most
    return Row(what, f"{measured:.2f}", f">= {least:.2f}" if least else f"<= {most:.2f}", is_met, figures)


def figure(what: str, measured: str, figures: str) -> Row:
    """Return a row that has no target."""
    return Row(what, measured, NO_TARGET, is_met=True, figures=figures)


def machine(postgresql: str, generator: str) -> str:
    """Describe the machine of the measurement."""
    gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{os.cpu_count()} cores of {_cpu_model()}, {gigabytes:.0f} GB, "
        f"load {os.getloadavg()[0]:.1f} at the start; "
        f"{platform.system()}, Python {platform.python_version()}, "
        f"PostgreSQL {postgresql} (embedded, fsync on); load by {generator}, all on this machine"
    )


def print_table(rows: list[Row]) -> None:
    """Print the rows and the missed targets."""
    table = Table("what", "measured", "to reach", "", "figures (median of the rounds)", show_lines=True)
    for row in rows:
        verdict = {True: ("ok", "green"), False: ("MISSED", "red"), None: ("INVALID", "bold red")}[row.is_met]
        shown = Text(*verdict) if row.to_reach != NO_TARGET else Text()
        table.add_row(row.what, row.measured, row.to_reach, shown, row.figures)
    out.print(table)
    missed = [row.what for row in rows if not row.is_met]
    out.print(f"missed: {'; '.join(missed)}" if missed else "every target is reached", markup=False)


class Memory(NamedTuple):
    """The resident memory of a process, in MB."""

    now: float
    most: float


def resident_mb(pid: int) -> Memory:
    """Measure a process. If only its present size is available, that also stands for the peak.

    getrusage is not suitable: a new process inherits the peak of the process that started it.
    """
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        sizes = dict(
            re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status.read_text(encoding="utf-8"), re.MULTILINE)
        )
        return Memory(int(sizes["VmRSS"]) / 1024, int(sizes["VmHWM"]) / 1024)
    listed = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return Memory(int(listed.stdout) / 1024, int(listed.stdout) / 1024)


def _cpu_model() -> str:
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpus.read_text(encoding="utf-8")) if cpus.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
