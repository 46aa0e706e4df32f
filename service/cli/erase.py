"""``erase``."""

import asyncpg

from service.cli.console import MISUSED, connected, end, out, run_with_database
from service.database.schema import act_as_owner, check_version

ERASE_ORDER = "CALL erase_order($1, $2)"


def erase(order_no: str, reason: str) -> None:
    if not reason.strip():
        end("an erasure has a reason", MISUSED)

    async def work(dsn: str) -> int:
        async with connected(dsn) as connection:
            await check_version(connection)
            try:
                async with connection.transaction():
                    await act_as_owner(connection)
                    await connection.execute(ERASE_ORDER, order_no, reason)
            except asyncpg.NoDataFoundError as error:
                end(str(error))
        out.print("erased: bodies and addresses; status, times and verdicts stay")
        return 0

    run_with_database(work, as_service=False)
