from datetime import UTC, datetime

from service.cli.console import EXIT_FAILURE, database, show
from service.maintenance import check as checks
from service.settings import read_settings
from service.subscriptions.held_orders import HELD_ORDERS_MAX


async def check() -> int | None:
    settings = read_settings()
    async with database(as_service=False) as dsn:
        findings = [
            checks.check_webhook(settings),
            *checks.check_settings_file(),
            checks.describe_database(settings, dsn),
            *checks.check_account(settings),
            *await checks.check_database(
                dsn,
                is_open=settings.is_open,
                retention_days=settings.body_retention_days,
                replica_age_seconds_max=settings.replica_age_seconds_max if settings.read_only else None,
                held_orders_max=HELD_ORDERS_MAX,
            ),
        ]
    findings += checks.check_embedded(settings, datetime.now(UTC).date())
    for finding in findings:
        show(f"{finding.kind:<5}  {finding.text}")
    return EXIT_FAILURE if any(finding.kind == "WRONG" for finding in findings) else None
