"""The plots of the overview, and the tables that say the same to who cannot see them."""

from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta
from typing import Any, Final

from domain.statuses import STATUSES
from domain.transitions import VERDICTS
from service.pages import charts as plots
from service.pages.charts import Bar, Column, Span
from service.pages.i18n import Words
from service.pages.overview import DAYS_SHOWN, MOVES_SHOWN_MAX, Overview
from service.pages.render import kind_of

# A word beneath every so many columns.
TICK_MINUTES: Final = 15
TICK_DAYS: Final = 3


def plots_of(known: Overview, w: Words) -> dict[str, Any]:
    """Return what the template of the overview shows beside the numbers themselves."""
    return {
        **_by_status(known, w),
        **_per_minute(known, w),
        **_per_day(known, w),
        **_moves(known, w),
        "verdict_words": [w.t[verdict] for verdict in VERDICTS],
    }


def _by_status(known: Overview, w: Words) -> dict[str, Any]:
    orders = dict(known.statistics.statuses)
    order: list[str | None] = [status for status in (*STATUSES, None) if orders.get(status)]
    order += [status for status in orders if status not in order and orders[status]]
    rows = [
        Bar(
            w.status(status),
            orders[status],
            w.number(orders[status]),
            kind_of(status),
            f"/track?status={status}" if status in STATUSES else "",
        )
        for status in order
    ]
    said = ", ".join(f"{row.label} {row.shown}" for row in rows) or w.t["no_orders"]
    return {"by_status": plots.bars("plot-status", w.t["by_status"], said, rows)}


def _per_minute(known: Overview, w: Words) -> dict[str, Any]:
    rows = [
        Column(
            w.clock(minute),
            w.clock(minute) if minute.minute % TICK_MINUTES == 0 else "",
            [(verdict, counts.get(verdict, 0)) for verdict in VERDICTS],
        )
        for minute, counts in known.minutes
    ]
    total = sum(sum(counts.values()) for _, counts in known.minutes)
    said = f"{w.number(total)} {w.t['reports']}"
    return {
        "per_minute": plots.columns("plot-minute", w.t["per_minute"], said, rows),
        "minute_rows": _as_rows([row for row in rows if any(count for _, count in row.parts)], w),
    }


def _per_day(known: Overview, w: Words) -> dict[str, Any]:
    counted = dict(known.statistics.days)
    today = known.now.astimezone(UTC).date()
    rows = []
    for ago in reversed(range(DAYS_SHOWN)):
        day = today - timedelta(days=ago)
        name = w.day(datetime.combine(day, time(), UTC))
        counts = counted.get(day, {})
        tick = name if ago % TICK_DAYS == 0 else ""
        rows.append(Column(name, tick, [(verdict, counts.get(verdict, 0)) for verdict in VERDICTS]))
    total = sum(count for row in rows for _, count in row.parts)
    said = f"{w.number(total)} {w.t['reports']}"
    return {
        "per_day": plots.columns("plot-day", w.t["per_day"], said, rows),
        "day_rows": _as_rows(rows, w),
    }


def _moves(known: Overview, w: Words) -> dict[str, Any]:
    often = sorted(known.statistics.moves, key=lambda move: -move.times)[:MOVES_SHOWN_MAX]
    spans, table = [], []
    for move in often:
        name = f"{w.status(move.previous_status)} → {w.status(move.status)}"
        half, nine, *_ = move.seconds
        spans.append(Span(name, half, nine, w.span(half)))
        table.append((name, w.number(move.times), w.span(half), w.span(nine)))
    said = "; ".join(f"{span.label} {span.shown}" for span in spans)
    return {"moves": plots.spans("plot-moves", w.t["time_spent"], said, spans), "move_rows": table}


def _as_rows(rows: Sequence[Column], w: Words) -> list[tuple[str, ...]]:
    return [(row.label, *(w.number(count) for _, count in row.parts)) for row in rows]
