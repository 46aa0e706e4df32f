"""``make faults``: break the service in every known way, and report lost and doubled reports.

Exit codes: 0 if every promise held, 1 if one did not (as it must with --mutation), 2 for wrong usage.
"""

import argparse
import asyncio
import random
import signal
import sys
from typing import Final

import uvloop
from rich.console import Console
from rich.table import Table

from service.http.server import raise_open_files_limit
from tests.faults.deliveries import long_deliveries
from tests.faults.fault import Fault
from tests.faults.faults import FAULTS
from tests.faults.mutations import MUTATIONS
from tests.faults.run import Outcome, run
from tests.faults.soak import soak
from tests.faults.world import FULL

out: Final = Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, help="of everything that is left to chance; printed")
    parser.add_argument("--only", metavar="NAME[,NAME]", help="these faults alone")
    parser.add_argument("--short", action="store_true", help="the selection that is a part of make test")
    parser.add_argument("--list", action="store_true", help="name the faults and mutations")
    parser.add_argument(
        "--mutation", metavar="NAME", help="prove the harness: a service that must turn out red"
    )
    parser.add_argument(
        "--soak", type=float, metavar="SECONDS", help="instead, kills and rebuilds for so long, under load"
    )
    parser.add_argument(
        "--deliveries",
        type=int,
        metavar="EVENTS",
        help="instead, deliver so many to a failing shop, with kills",
    )
    arguments = parser.parse_args()
    known = {fault.name: fault for fault in (*FAULTS, *MUTATIONS)}
    names = [fault.name for fault in FAULTS if fault.is_short or not arguments.short]
    if arguments.only or arguments.mutation:
        names = (arguments.mutation or arguments.only).split(",")
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"there is no {unknown[0]}; there are {', '.join(known)}")
    arguments.faults = [known[name] for name in names]
    if arguments.soak is not None:
        arguments.faults = [soak(arguments.soak)]
    elif arguments.deliveries is not None:
        arguments.faults = long_deliveries(arguments.deliveries)
    return arguments


async def _run(faults: list[Fault], seed: int) -> list[Outcome]:
    task = asyncio.current_task()
    if task is not None:
        # On SIGTERM, cancel the run, so that it leaves nothing behind.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    outcomes = []
    for number, fault in enumerate(faults, start=1):
        out.print(f"{number}/{len(faults)} {fault.claim} ...", end=" ")
        outcome = await run(fault, FULL, seed)
        outcomes.append(outcome)
        out.print(_verdict(outcome), f"({outcome.seconds:.0f} s)")
        for line in outcome.violations:
            out.print(f"    {line}", markup=False, style="red", soft_wrap=True)
    return outcomes


def _verdict(outcome: Outcome) -> str:
    if outcome.skipped:
        return "skipped"
    return "[red]violated[/red]" if outcome.violations else "[green]held[/green]"


def _table(outcomes: list[Outcome], seed: int) -> Table:
    table = Table("fault", title=f"faults, seed {seed}")
    for name in ("times", "acknowledged", "lost", "doubled", "refused", "wrong", "worst outage"):
        table.add_column(name, justify="right")
    table.add_column("promises")
    table.add_column("the operator sees")
    table.add_column("remarks")
    for outcome in outcomes:
        count = outcome.count
        table.add_row(
            outcome.fault.claim,
            str(outcome.times),
            *(f"{number:,}" for number in count),
            f"{outcome.worst_outage:.2f} s",
            _verdict(outcome),
            outcome.told,
            outcome.skipped or "; ".join(outcome.remarks),
        )
    return table


def main() -> int:
    """Run the selected faults, and return the exit code."""
    arguments = _arguments()
    if arguments.list:
        for fault in (*FAULTS, *MUTATIONS):
            out.print(f"{fault.name:22} {fault.claim}{', short' if fault.is_short else ''}")
        return 0
    # Each of thousands of connections is an open file, both here and in the service.
    raise_open_files_limit()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    try:
        outcomes = uvloop.run(_run(arguments.faults, seed))
    except (asyncio.CancelledError, KeyboardInterrupt):
        return 1
    out.print(_table(outcomes, seed))
    return int(any(outcome.violations for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
