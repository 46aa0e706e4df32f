"""``check`` and ``migrate``."""

from service.cli.console import WRONG, connected, out, run_with_database
from service.database.schema import SCHEMA_VERSION, apply_schema
from service.maintenance import check as checks
from service.settings import read_settings


def check() -> None:
    async def work(dsn: str) -> int:
        settings = read_settings()
        findings = [
            *checks.check_settings(settings),
            checks.place(settings, dsn),
            *await checks.check(dsn),
        ]
        for finding in findings:
            out.print(f"{finding.kind:<5}  {finding.text}", markup=False)
        return WRONG if any(finding.kind == "WRONG" for finding in findings) else 0

    run_with_database(work, as_service=False)


def migrate() -> None:
    async def work(dsn: str) -> int:
        async with connected(dsn) as connection:
            await apply_schema(connection)
        out.print(f"the schema has version {SCHEMA_VERSION}")
        return 0

    run_with_database(work, as_service=False, may_make=True)
