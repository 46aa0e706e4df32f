from typing import Annotated

import asyncpg
import typer

from service.command_name import command_name
from service.console import EXIT_USAGE, database, err, fail, show
from service.database.connections import connected
from service.database.operations import system_user
from service.database.schema import check_version, service_dsn
from service.features.settings import read_settings
from service.maintenance import erasure


async def erase(
    order_no: Annotated[str, typer.Argument(help="The order number.")],
    reason: Annotated[str, typer.Argument(help="Why you erase it; the reason is recorded.")],
) -> None:
    if not reason.strip():
        fail("the reason is empty: state why you erase this order", EXIT_USAGE)
    async with database(read_settings(), as_service=False) as dsn, connected(dsn) as owner:
        await check_version(owner)
        async with connected(await service_dsn(dsn)) as service:
            try:
                erased = await erasure.erase_order(owner, order_no, reason, system_user())
            except asyncpg.NoDataFoundError as error:
                fail(error)
            late = await erasure.settle(owner, service, [order_no])
        show("erased bodies, addresses and unknown words; the status, the times and the verdicts remain")
        show(f"events: {erased.events}, quarantine entries: {erased.entries}")
        if late:
            err.print(
                f"these views still have the erased words: {', '.join(late)}; a running service erases them as "
                f"soon as it can, and '{command_name()} replay' does it at once"
            )
        if left := await erasure.find_left(owner, order_no):
            entries = ", ".join(map(str, left))
            err.print(
                f"left: entries in which the order number occurs, but which do not name the order: {entries}"
            )
            err.print("read them with 'quarantine show', and delete them as docs/operations.md shows")
        # Until PostgreSQL uses the space again, the old bytes stay in its files.
        await owner.execute(erasure.VACUUM)
