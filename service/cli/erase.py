from typing import Annotated, Final

import asyncpg
import typer

from service.cli.console import EXIT_USAGE, database, fail, show
from service.database.connections import connected
from service.database.operations import record_operation, system_user
from service.database.schema import act_as_owner, check_version

ERASE_ORDER: Final = "CALL erase_order($1, $2)"


async def erase(
    order_no: Annotated[str, typer.Argument(help="The order number.")],
    reason: Annotated[str, typer.Argument(help="Why you erase it; the reason is recorded.")],
) -> None:
    if not reason.strip():
        fail("the reason is empty: state why you erase this order", EXIT_USAGE)
    async with database(as_service=False) as dsn, connected(dsn) as connection:
        await check_version(connection)
        try:
            async with connection.transaction():
                await act_as_owner(connection)
                await connection.execute(ERASE_ORDER, order_no, reason)
                await record_operation(connection, system_user(), "order_erased", order_no, reason)
        except asyncpg.NoDataFoundError as error:
            fail(error)
    show("erased bodies and addresses; the status, the times and the verdicts remain")
