from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Annotated, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from domain.logged import FailedEvent
from domain.order import Order
from service.console import EXIT_FAILURE, EXIT_USAGE, database, dedicated, err, fail, show, show_table
from service.database.connections import connect, connected
from service.database.operations import record_operation, system_user
from service.event_log.follow import Log
from service.event_log.snapshot import snapshot
from service.features.settings import read_settings
from service.ingest.recorder import Recorder, UnrecordableReportError
from service.maintenance import rejudgement
from service.maintenance.audit import Change, TableAudit
from service.maintenance.rejudgement import PendingReport, PendingReports
from service.vocabulary import VocabularyFile

# The time limit for one report, which competes with the reports that the service records.
RECORD_SECONDS_MAX: Final = 10.0
# A dry run lists this many reports of each kind, and only counts the rest.
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
    async with database(read_settings()) as dsn, dedicated(dsn) as connection, AsyncExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, console=err, disable=not err.is_terminal))
        task = progress.add_task("rejudge", total=None)
        advance = partial(progress.advance, task)
        if order is not None:
            batches = rejudgement.order_batches(Log(connection), order, advance)
        else:
            whole = await stack.enter_async_context(snapshot(partial(connect, dsn)))
            progress.update(task, total=whole.total)
            batches = rejudgement.log_batches(whole, advance)
        code = await (
            _apply(dsn, rejudgement.find_pending(batches, pending), vocabulary, order)
            if apply
            else _list(batches, pending)
        )
    if pending.undecodable:
        err.print(f"orders left out, because this release cannot read their events: {pending.undecodable}")
    return EXIT_FAILURE if pending.undecodable else code


async def _list(
    batches: AsyncIterator[Sequence[Order.StatusReported | FailedEvent]], pending: PendingReports
) -> int | None:
    """List what --apply would judge again and, apart from it, the verdicts that today's table would change."""
    table = TableAudit()
    found: list[PendingReport] = []
    changes: list[Change] = []
    async for batch in batches:
        for event in batch:
            found += pending.add(event)
            if isinstance(event, Order.StatusReported) and (change := table.add(event)) is not None:
                changes.append(change)
    found += pending.end_order()
    if found:
        rows = [(*one[:3], one.verdict, one.status) for one in found[:LISTED_MAX]]
        show_table(("order", "version", "reported", "verdict now", "status after it"), rows)
    show(f"reports that --apply would judge again: {len(found)}")
    if changes:
        columns = ("order", "version", "reported", "recorded verdict", "today's verdict", "today's status")
        show_table(columns, changes[:LISTED_MAX])
        show(f"verdicts that today's table would change: {len(changes)}; they stay as they are")
    return EXIT_FAILURE if found or changes else None


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
