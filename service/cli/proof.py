import json
from pathlib import Path
from typing import Annotated

import typer

from service.cli.console import EXIT_USAGE, database, fail
from service.database.connections import connected
from service.history.bundles import NotInHistoryError, SinceError, make_bundle
from service.history.notes import NoteError, read_checkpoint
from service.history.signer import make_signer
from service.settings import read_settings


async def proof(
    order_no: Annotated[str, typer.Argument(help="The order number.")],
    *,
    bodies: Annotated[
        bool, typer.Option("--bodies", help="Open the commitments to the reports' bodies.")
    ] = False,
    since: Annotated[
        Path | None, typer.Option(help="A file with an older checkpoint, which the proof shall continue.")
    ] = None,
) -> None:
    settings = read_settings()
    size = None if since is None else _read_size(since)
    async with database() as dsn, connected(dsn) as connection:
        try:
            bundle = await make_bundle(
                connection,
                make_signer(settings),
                order_no,
                with_bodies=bodies,
                since=size,
                events_max=None,
            )
        except NotInHistoryError:
            fail(
                f"the signed history has no event of {order_no}: check the order number; if its first report "
                "has just arrived, try again in a moment, while the service runs"
            )
        except SinceError as error:
            fail(error)
    # In ASCII, so that a terminal acts on none of it.
    typer.echo(json.dumps(bundle, indent=2))


def _read_size(file: Path) -> int:
    try:
        return read_checkpoint(file.read_text(encoding="utf-8")).size
    except (OSError, UnicodeError, NoteError) as error:
        fail(f"{file} is not a file with a checkpoint: {error}", EXIT_USAGE)
