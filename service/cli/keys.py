"""``keys create|list|revoke``."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.text import Text

from service.cli.console import connected, end, err, make_table, out, run_with_database, time_text
from service.http import access as api_keys
from service.http.access import Scope
from service.text import printable

keys = typer.Typer(no_args_is_help=True, add_completion=False)


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What it is for; shown in lists, never used again.")],
    scope: Annotated[Scope, typer.Option(help="read, or admin: read and operate.")] = "read",
    days: Annotated[
        int | None, typer.Option(min=1, max=36_500, help="When it expires; never if left out.")
    ] = None,
) -> None:
    """Make a key, and show its secret, once."""

    async def work(dsn: str) -> int:
        expires_at = datetime.now(UTC) + timedelta(days=days) if days is not None else None
        async with connected(dsn) as connection:
            try:
                secret = await api_keys.create_key(connection, name, scope, expires_at)
            except api_keys.KeyNotMadeError as error:
                end(str(error))
        out.print(secret, markup=False)
        err.print("send it as 'Authorization: Bearer ...'; it cannot be shown again", markup=False)
        return 0

    run_with_database(work)


@keys.command("list")
def list_keys() -> None:
    """List every key that was ever made."""

    async def work(dsn: str) -> int:
        async with connected(dsn) as connection:
            known = await api_keys.all_keys(connection)
        table = make_table("name", "scope", "made", "expires", "last used", "revoked")
        for key in known:
            times = (key.created_at, key.expires_at, key.last_used_at, key.revoked_at)
            table.add_row(Text(key.name), key.scope, *(time_text(time) for time in times))
        out.print(table)
        return 0

    run_with_database(work)


@keys.command("revoke")
def revoke_key(name: str) -> None:
    """Revoke a key for good; it is refused within a second."""

    async def work(dsn: str) -> int:
        async with connected(dsn) as connection:
            if not await api_keys.revoke_key(connection, name):
                end(f"there is no key of the name {printable(name)} that is not revoked")
        out.print("revoked")
        return 0

    run_with_database(work)
