import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Annotated, Final

import typer

from projections.position import AFTER_POSITION_SECONDS_MAX
from service.cli.console import EXIT_USAGE, database, fail
from service.database.connections import connected
from service.event_log.store import head_position
from service.history.bundles import Bundle, NotInHistoryError, NotSignedYetError, SinceError, make_bundle
from service.history.notes import NoteError, read_checkpoint
from service.history.signer import make_signer
from service.settings import read_settings

# How often a proof that waits for the service's signature is tried again.
POLL_SECONDS: Final = 0.1


async def proof(
    order_no: Annotated[str, typer.Argument(help="The order number.")],
    *,
    bodies: Annotated[
        bool, typer.Option("--bodies", help="Open the commitments to the reports' bodies.")
    ] = False,
    since: Annotated[
        Path | None, typer.Option(help="A file with an older checkpoint, which the proof shall continue.")
    ] = None,
    from_version: Annotated[int, typer.Option(min=1, help="Begin with this version of the order.")] = 1,
    after_position: Annotated[
        int | None,
        typer.Option(min=0, help="Wait until the service has signed this position, such as a receipt's."),
    ] = None,
) -> None:
    signer = make_signer(read_settings())
    size = None if since is None else _read_size(since)
    async with database() as dsn, connected(dsn) as connection:
        if after_position is not None and after_position > (head := await head_position(connection)):
            fail(f"the log ends at position {head}, before {after_position}: pass at most {head}")
        make = partial(
            make_bundle,
            *(connection, signer, order_no),
            with_bodies=bodies,
            since=size,
            from_version=from_version,
            after_position=after_position,
            events_max=None,
        )
        try:
            bundle = await _wait_until_signed(make)
        except NotInHistoryError:
            fail(
                f"the signed history has no such event of {order_no}: check the order number and the version; "
                "if the report has just arrived, pass its position as --after-position"
            )
        except NotSignedYetError as error:
            fail(f"{error}, not {after_position}: is the service running? See 'order-tracking check'")
        except SinceError as error:
            fail(error)
    # In ASCII, so that a terminal acts on none of it.
    typer.echo(json.dumps(bundle, indent=2))


async def _wait_until_signed(make: Callable[[], Awaitable[Bundle]]) -> Bundle:
    """Return the bundle as soon as the service has signed its position, for which this waits a while."""
    deadline = monotonic() + AFTER_POSITION_SECONDS_MAX
    while True:
        try:
            return await make()
        except NotSignedYetError:
            if monotonic() >= deadline:
                raise
            await asyncio.sleep(POLL_SECONDS)


def _read_size(file: Path) -> int:
    try:
        return read_checkpoint(file.read_text(encoding="utf-8")).size
    except (OSError, UnicodeError, NoteError) as error:
        fail(f"{file} is not a file with a checkpoint: {error}", EXIT_USAGE)
