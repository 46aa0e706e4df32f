from collections.abc import AsyncIterator, Collection
from datetime import UTC, datetime

from service.console import EXIT_FAILURE, database, show
from service.database.connections import connected
from service.features import FEATURES, SWITCHED, choose_features
from service.features.settings import Settings, read_settings
from service.maintenance import check as checks
from service.maintenance.check import Finding


async def check(*, options: Collection[str]) -> int | None:
    settings = read_settings()
    async with database(settings, as_service=False) as dsn:
        found = await checks.check_database(
            dsn,
            is_open=settings.is_open,
            retention_days=settings.body_retention_days,
            replica_age_seconds_max=settings.replica_age_seconds_max if settings.read_only else None,
        )
        findings = [
            checks.check_webhook(settings),
            *checks.check_settings_file(settings),
            checks.describe_database(settings, dsn),
            *checks.check_account(settings),
            *found,
        ]
        # Without its schema, the database has no table of a feature.
        if checks.is_current(found):
            findings += [finding async for finding in _check_features(settings, dsn, options)]
    findings += checks.check_embedded(settings, datetime.now(UTC).date())
    for finding in findings:
        show(f"{finding.kind:<5}  {finding.text}")
    return EXIT_FAILURE if any(finding.kind == "WRONG" for finding in findings) else None


async def _check_features(settings: Settings, dsn: str, options: Collection[str]) -> AsyncIterator[Finding]:
    # A policy on a table is a function of its owner's; it must not run as the operator.
    async with connected(dsn, row_security="off") as connection:
        chosen = await choose_features(settings, connection)
        yield Finding("ok", f"features that are on: {', '.join(chosen.on) or 'none'}")
        for feature in FEATURES:
            name = feature.name
            if name in chosen.on:
                if (check_feature := feature.load("check")) is not None:
                    async for finding in check_feature(connection, settings, options):
                        yield finding
                continue
            for option in feature.options:
                if option.command == "check" and option.name in options:
                    yield Finding("WRONG", f"nothing was done for --{option.name}: the feature {name} is off")
            if name in SWITCHED and (names := settings.find_set(feature.load("settings"))):
                yield Finding("note", f"without effect, since the feature {name} is off: {', '.join(names)}")
            if (use := chosen.used_but_off.get(name)) is not None:
                yield Finding("note", f"the feature {name} is off, but {use}: {feature.while_off}")
