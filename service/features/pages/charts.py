"""The overview's charts as SVG, and tables of the same numbers. The style sheet colours them by class name."""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, NamedTuple, cast

from markupsafe import Markup

from domain.statuses import STATUSES
from domain.transitions import VERDICTS
from service.features.pages.i18n import Locale
from service.features.pages.overview import DAYS_SHOWN, MOVES_SHOWN_MAX, Overview
from service.features.pages.render import choose_tone

# Lengths are in units of the SVG's viewBox, which the browser scales to the card.
WIDTH: Final = 480
BAR_HEIGHT: Final = 30
SPAN_HEIGHT: Final = 46
COLUMNS_HEIGHT: Final = 190
COLUMNS_TOP: Final = 12
COLUMNS_FLOOR: Final = COLUMNS_HEIGHT - 26
COLUMNS_LEFT: Final = 44
LABEL_WIDTH: Final = 150
VALUE_WIDTH: Final = 56
# A shorter rectangle would be invisible, and its count would look like zero.
LENGTH_MIN: Final = 2.0
TICK_MINUTES: Final = 15
TICK_DAYS: Final = 3


class Bar(NamedTuple):
    """One bar: ``tone`` is the class of its colour, ``href`` the target of its link, or empty."""

    label: str
    value: int
    tone: str
    href: str


class Column(NamedTuple):
    """One column: its report counts by verdict, and whether its label is written below it.

    ``exact`` is its time for tooltips, with the date and the time zone.
    """

    label: str
    exact: str
    counts: Mapping[str, int]
    has_tick: bool


class Span(NamedTuple):
    """A range of time in seconds: a dot at ``start`` and a line from there to ``end``."""

    label: str
    start: float
    end: float


def draw_charts(overview: Overview, locale: Locale) -> dict[str, Any]:
    """Return the charts and the rows of their tables, by the names that the overview's template uses."""
    orders = {count["status"]: count["orders"] for count in overview.statistics["statuses"]}
    bars = []
    # Statuses that only a newer release has come last.
    for status in dict.fromkeys((*STATUSES, None, *orders)):
        if orders.get(status):
            link = f"/track?status={status}" if status in STATUSES else ""
            bars.append(Bar(locale.status(status), orders[status], choose_tone(status), link))
    minutes = [
        Column(locale.clock(minute), locale.time(minute), counts, minute.minute % TICK_MINUTES == 0)
        for minute, counts in overview.minutes
    ]
    reports = {day["day"]: cast("Mapping[str, int]", day["reports"]) for day in overview.statistics["days"]}
    today = overview.now.astimezone(locale.zone).date()
    dates = [(ago, today - timedelta(days=ago)) for ago in reversed(range(DAYS_SHOWN))]
    days = [
        Column(locale.day(day), locale.full_day(day), reports.get(day, {}), ago % TICK_DAYS == 0)
        for ago, day in dates
    ]
    spans, move_rows = [], []
    for move in sorted(overview.statistics["moves"], key=lambda move: -move["times"])[:MOVES_SHOWN_MAX]:
        label = f"{locale.status(move['from'])} → {locale.status(move['to'])}"
        p50, p90 = move["seconds_p50"], move["seconds_p90"]
        spans.append(Span(label, p50, p90))
        move_rows.append((label, locale.number(move["times"]), locale.duration(p50), locale.duration(p90)))
    return {
        "verdict_texts": [locale.texts[verdict] for verdict in VERDICTS],
        "by_status": draw_bars("by_status", bars, locale),
        "per_minute": draw_columns("per_minute", minutes, locale),
        "minute_rows": _rows((column for column in minutes if any(column.counts.values())), locale),
        "per_day": draw_columns("per_day", days, locale),
        "day_rows": _rows(days, locale),
        "moves": draw_spans("time_spent", spans, locale),
        "move_rows": move_rows,
    }


def _rows(columns: Iterable[Column], locale: Locale) -> list[list[str]]:
    return [
        [label, *(locale.number(counts.get(verdict, 0)) for verdict in VERDICTS)]
        for label, _, counts, _ in columns
    ]


def draw_bars(name: str, bars: Sequence[Bar], locale: Locale) -> Markup:
    """Draw counts as horizontal bars, each between its label and its number. ``name`` selects the title."""
    maximum = max((bar.value for bar in bars), default=1)
    room = WIDTH - LABEL_WIDTH - VALUE_WIDTH
    elements = []
    for index, bar in enumerate(bars):
        y, length = index * BAR_HEIGHT, max(LENGTH_MIN, bar.value / maximum * room)
        place = {"x": LABEL_WIDTH, "y": y + 8, "height": 14}
        drawing = (
            _element("rect", class_="track", width=room, rx=7, **place)
            + _element("rect", class_=f"bar {bar.tone}", width=length, rx=min(7, length / 2), **place)
            + _element("text", bar.label, class_="label end", x=LABEL_WIDTH - 12, y=y + 20)
            + _element("text", locale.number(bar.value), class_="value", x=WIDTH - VALUE_WIDTH + 10, y=y + 20)
        )
        elements.append(_element("a", drawing, href=bar.href) if bar.href else drawing)
    description = ", ".join(f"{bar.label} {locale.number(bar.value)}" for bar in bars)
    return _svg(name, locale, description, len(bars) * BAR_HEIGHT, elements)


def draw_columns(name: str, columns: Sequence[Column], locale: Locale) -> Markup:
    """Draw report counts as columns from left to right, with the verdicts of each column stacked."""
    totals = [sum(column.counts.values()) for column in columns]
    maximum = round_up(max(totals, default=0))
    scale = (COLUMNS_FLOOR - COLUMNS_TOP) / maximum
    step = (WIDTH - COLUMNS_LEFT) / max(1, len(columns))
    width = max(1.5, min(30.0, step * 0.72))
    elements = []
    for value in (0, maximum // 2, maximum):
        y = COLUMNS_FLOOR - value * scale
        elements.append(_element("line", class_="grid", x1=COLUMNS_LEFT, y1=y, x2=WIDTH, y2=y))
        elements.append(_element("text", locale.number(value), class_="tick end", x=COLUMNS_LEFT - 8, y=y + 4))
    for index, (label, exact, counts, has_tick) in enumerate(columns):
        x, y = COLUMNS_LEFT + index * step + (step - width) / 2, float(COLUMNS_FLOOR)
        for verdict in VERDICTS:
            if count := counts.get(verdict, 0):
                height = max(LENGTH_MIN, count * scale)
                y -= height
                place = {"x": x, "y": y, "width": width, "height": height, "rx": 1.5}
                hint = _element("title", f"{exact}, {locale.texts[verdict]}: {locale.number(count)}")
                elements.append(_element("rect", hint, class_=f"column {verdict}", **place))
        if has_tick:
            place = {"x": x + width / 2, "y": COLUMNS_HEIGHT - 6}
            elements.append(_element("text", label, class_="tick middle", **place))
    description = locale.texts["report_count"].format(reports=locale.number(sum(totals)))
    return _svg(name, locale, description, COLUMNS_HEIGHT, elements)


def draw_spans(name: str, spans: Sequence[Span], locale: Locale) -> Markup:
    """Draw ranges of time one below the other, on a logarithmic scale."""

    def log(seconds: float) -> float:
        return math.log10(max(1.0, seconds))

    least = min((log(span.start) for span in spans), default=0.0)
    most = max([1.0, *(log(span.end) for span in spans)])
    scale = (WIDTH - 24) / max(most - least, 0.5)
    elements = []
    for index, span in enumerate(spans):
        y = index * SPAN_HEIGHT + 34
        start, end = (12 + (log(seconds) - least) * scale for seconds in (span.start, span.end))
        elements += [
            _element("text", span.label, class_="label", x=0, y=y - 16),
            _element("text", locale.duration(span.start), class_="value end", x=WIDTH, y=y - 16),
            _element("line", class_="track-line", x1=6, y1=y, x2=WIDTH - 6, y2=y),
            _element("line", class_="span", x1=start, y1=y, x2=end, y2=y),
            _element("circle", class_="dot", cx=start, cy=y, r=6),
        ]
    description = ", ".join(f"{span.label} {locale.duration(span.start)}" for span in spans)
    return _svg(name, locale, description, len(spans) * SPAN_HEIGHT, elements)


def round_up(value: int) -> int:
    """Return the smallest of 2, 4, 10, 20, 40, 100, ... that is not below a value."""
    size = 1
    while value > 10 * size:
        size *= 10
    return next(step * size for step in (2, 4, 10) if value <= step * size)


def _element(tag: str, *content: str, **attributes: str | float) -> Markup:
    """Return an element. Text is escaped, numbers are rounded; ``class_`` is the attribute "class"."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_"), value if isinstance(value, str) else round(value, 1))
        for name, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(tag, pairs, Markup("").join(content))


def _svg(name: str, locale: Locale, description: str, height: int, elements: Sequence[Markup]) -> Markup:
    # The parts of an image are hidden from assistive technology, so a chart with links is a group.
    role = "group" if any(element.startswith("<a ") for element in elements) else "img"
    title = _element("title", locale.texts[name], id=f"{name}-title")
    desc = _element("desc", description, id=f"{name}-description")
    labels = {"role": role, "aria-labelledby": f"{name}-title {name}-description"}
    return _element("svg", title, desc, *elements, class_="plot", viewBox=f"0 0 {WIDTH} {height}", **labels)
