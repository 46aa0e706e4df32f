from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

import typer

from service.console import database, err, fail, show, show_table
from service.database import api_keys
from service.database.api_keys import Scope
from service.database.connections import connected
from service.database.operations import record_operation, system_user
from service.database.sessions import end_sessions_of
from service.features.settings import read_settings

DAYS_MAX: Final = 36_500

keys = typer.Typer(no_args_is_help=True, add_completion=False)


@keys.command("create")
async def create_key(
    name: Annotated[str, typer.Argument(help="What you use the key for. A name can be used only once.")],
    scope: Annotated[
        Scope,
        typer.Option(
            help="read, without raw bodies and senders' addresses; read:bodies, with them; "
            "or admin, to operate too."
        ),
    ] = "read",
    days: Annotated[
        int | None, typer.Option(min=1, max=DAYS_MAX, help="Days until the key expires; never if left out.")
    ] = None,
) -> None:
    """Create a key and print its secret, which you cannot print again."""
    expires_at = datetime.now(UTC) + timedelta(days=days) if days is not None else None
    async with database(read_settings()) as dsn, connected(dsn) as connection, connection.transaction():
        secret = await api_keys.create_key(connection, name, scope, expires_at)
        await record_operation(connection, system_user(), "key_created", name, f"scope {scope}")
    show(secret)
    err.print("send it as 'Authorization: Bearer <key>'; it cannot be shown again")


@keys.command("list")
async def list_keys() -> None:
    """List all keys, including expired and revoked ones."""
    async with database(read_settings()) as dsn, connected(dsn) as connection:
        rows = [
            (key.name, key.scope, key.created_at, key.expires_at, key.last_used_at, key.revoked_at)
            for key in await api_keys.list_keys(connection)
        ]
    show_table(("name", "scope", "created", "expires", "last used", "revoked"), rows)


@keys.command("revoke")
async def revoke_key(name: Annotated[str, typer.Argument(help="The name of the key.")]) -> None:
    """Revoke a key permanently; the service rejects it within a second."""
    async with database(read_settings()) as dsn, connected(dsn) as connection, connection.transaction():
        if not await api_keys.revoke_key(connection, name):
            fail(f"no key that can be revoked is named {name}: see 'keys list'")
        await end_sessions_of(connection, name)
        await record_operation(connection, system_user(), "key_revoked", name)
    show("revoked")
