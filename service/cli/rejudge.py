from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from service.cli.console import EXIT_FAILURE, EXIT_USAGE, database, dedicated, err, fail, show, show_table
from service.database.connections import connect, connected
from service.database.operations import record_operation, system_user
from service.event_log.feed import Feed
from service.ingest.recorder import Recorder, UnrecordableReportError
from service.maintenance import rejudgement
from service.maintenance.rejudgement import PendingReport, PendingReports
from service.settings import read_settings
from service.vocabulary import VocabularyFile

# The time limit for one report, which competes with the reports that the service records.
RECORD_SECONDS_MAX: Final = 10.0
# A dry run lists this many reports and only counts the rest.
LISTED_MAX: Final = 1_000
# The subject of the recorded operation if no order was named.
EVERY_ORDER: Final = "*"


async def rejudge(
    *,
    apply: Annotated[bool, typer.Option("--apply", help="Append the new events.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the reports; exit with 1 if there are any.")
    ] = False,
    order: Annotated[str | None, typer.Option(help="The only order; all orders if left out.")] = None,
) -> int | None:
    if apply == dry_run:
        fail("pass either --dry-run, to list the reports, or --apply, to judge them again", EXIT_USAGE)
    vocabulary = read_settings().vocabulary
    pending = PendingReports(vocabulary.recognise)
    columns = ("reading", BarColumn(), MofNCompleteColumn(), "events, left", TimeRemainingColumn())
    async with database() as dsn, dedicated(dsn) as connection:
        feed = Feed(connection, partial(connect, dsn))
        head = await feed.head()
        with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
            total = await feed.count(head) if order is None else None
            advance = partial(progress.advance, progress.add_task("rejudge", total=total))
            batches = rejudgement.log_batches(feed, head, advance)
            if order is not None:
                batches = rejudgement.order_batches(feed, order, advance)
            found = rejudgement.find_pending(batches, pending)
            code = await (_apply(dsn, found, vocabulary, order) if apply else _list(found))
    if pending.undecodable:
        err.print(f"orders left out, because this release cannot read their events: {pending.undecodable}")
    return EXIT_FAILURE if pending.undecodable else code


async def _list(found: AsyncIterator[PendingReport]) -> int | None:
    rows: list[tuple[object, ...]] = []
    reports = 0
    async for report in found:
        reports += 1
        if reports <= LISTED_MAX:
            rows.append((*report[:3], report.verdict, report.status))
    if not reports:
        show("every unrecognised report whose word is known by now has been judged again")
        return None
    show_table(("order", "version", "reported", "verdict now", "status after it"), rows)
    show(
        f"reports to judge again: {reports}; the first {LISTED_MAX} are listed"
        if reports > LISTED_MAX
        else f"reports to judge again: {reports}"
    )
    return EXIT_FAILURE


async def _apply(
    dsn: str, found: AsyncIterator[PendingReport], vocabulary: VocabularyFile, order: str | None
) -> int | None:
    verdicts: Counter[str] = Counter()
    failures = 0
    async with connected(dsn) as connection, dedicated(dsn) as to_append:
        recorder = Recorder(
            to_append,
            lambda *_: None,
            queue_reports_max=1,
            seconds_max=RECORD_SECONDS_MAX,
            recognise=vocabulary.recognise,
        )
        async for report in found:
            if not verdicts and not failures:
                reason = "words of this release" if vocabulary.path is None else f"words of {vocabulary.path}"
                subject = order or EVERY_ORDER
                await record_operation(connection, system_user(), "reports_rejudged", subject, reason)
            try:
                receipt = await rejudgement.rejudge(recorder, report)
            except UnrecordableReportError as error:
                failures += 1
                err.print(f"version {report.version} of {report.order_no} cannot be judged again: {error}")
            else:
                verdicts[receipt["outcome"]] += 1
    counts = ", ".join(f"{verdict} {count}" for verdict, count in sorted(verdicts.items()))
    show(f"judged again: {verdicts.total()}{f' ({counts})' if counts else ''}")
    return EXIT_FAILURE if failures else None
