"""Plots, drawn as SVG by the service. Their colours are the style sheet's, by the names of classes."""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from markupsafe import Markup

WIDTH: Final = 480
COLUMNS_HEIGHT: Final = 190
BAR_HEIGHT: Final = 30
LABEL_WIDTH: Final = 150
VALUE_WIDTH: Final = 56
# Room above the columns, and for the words beneath them.
TOP: Final = 12
BOTTOM: Final = 26
LEFT: Final = 44
# A column that nobody could see would say that there is nothing.
SEEN_MIN: Final = 2.0

_SVG: Final = Markup(
    '<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{id}-title {id}-desc">'
    '<title id="{id}-title">{title}</title><desc id="{id}-desc">{said}</desc>{inside}</svg>'
)
_RECT: Final = Markup(
    '<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{rx}"/>'
)
_NAMED_RECT: Final = Markup(
    '<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{rx}">'
    "<title>{name}</title></rect>"
)
_TEXT: Final = Markup('<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{text}</text>')
_LINE: Final = Markup('<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
_DOT: Final = Markup('<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>')
_LINK: Final = Markup('<a href="{href}">{inside}</a>')


class Bar(NamedTuple):
    """One bar: its name, its value, the value as it is written, the class of its colour, where it leads."""

    label: str
    value: float
    shown: str
    kind: str
    href: str = ""


class Column(NamedTuple):
    """One column: its name, a word beneath it (or none), and its parts by the classes of their colours."""

    label: str
    tick: str
    parts: Sequence[tuple[str, int]]


class Span(NamedTuple):
    """A range of time: its name, its dot and the end of its line, in seconds, and how the dot is written."""

    label: str
    seconds: float
    until: float
    shown: str


def bars(name: str, title: str, said: str, rows: Sequence[Bar]) -> Markup:
    """Draw values as horizontal bars, each with its name before it and its value behind it."""
    most = max((row.value for row in rows), default=0) or 1
    room = WIDTH - LABEL_WIDTH - VALUE_WIDTH
    drawn = []
    for index, row in enumerate(rows):
        y = index * BAR_HEIGHT
        length = max(row.value / most * room, SEEN_MIN if row.value else 0)
        inside = (
            _RECT.format(kind="track", x=LABEL_WIDTH, y=y + 8, width=room, height=14, rx=7)
            + _RECT.format(
                kind=f"bar {row.kind}", x=LABEL_WIDTH, y=y + 8, width=length, height=14, rx=min(7, length / 2)
            )
            + _TEXT.format(kind="label end", x=LABEL_WIDTH - 12, y=y + 20, text=row.label)
            + _TEXT.format(kind="value", x=WIDTH - VALUE_WIDTH + 10, y=y + 20, text=row.shown)
        )
        drawn.append(_LINK.format(href=row.href, inside=inside) if row.href else inside)
    return _svg(name, title, said, max(1, len(rows)) * BAR_HEIGHT, drawn)


def columns(name: str, title: str, said: str, rows: Sequence[Column]) -> Markup:
    """Draw counts as columns from left to right, the parts of each stacked."""
    most = nice_maximum(max((sum(count for _, count in row.parts) for row in rows), default=0))
    room, floor = COLUMNS_HEIGHT - TOP - BOTTOM, COLUMNS_HEIGHT - BOTTOM
    step = (WIDTH - LEFT) / max(1, len(rows))
    width = max(1.5, min(30.0, step * 0.72))
    drawn = []
    for share in (0, 0.5, 1):
        y = floor - share * room
        drawn.append(_LINE.format(kind="grid", x1=LEFT, y1=y, x2=WIDTH, y2=y))
        if most * share == int(most * share):
            drawn.append(_TEXT.format(kind="tick end", x=LEFT - 8, y=y + 4, text=f"{int(most * share):,}"))
    for index, row in enumerate(rows):
        x, y = LEFT + index * step + (step - width) / 2, float(floor)
        for kind, count in row.parts:
            height = max(count / most * room, SEEN_MIN) if count else 0
            y -= height
            if count:
                told = f"{row.label}: {count:,}"
                drawn.append(
                    _NAMED_RECT.format(
                        kind=f"column {kind}", x=x, y=y, width=width, height=height, rx=1.5, name=told
                    )
                )
        if row.tick:
            drawn.append(_TEXT.format(kind="tick middle", x=x + width / 2, y=COLUMNS_HEIGHT - 6, text=row.tick))
    return _svg(name, title, said, COLUMNS_HEIGHT, drawn)


def spans(name: str, title: str, said: str, rows: Sequence[Span]) -> Markup:
    """Draw ranges of time beneath each other, on a scale of powers of ten."""
    least = math.log10(max(1.0, min((row.seconds for row in rows), default=1.0)))
    most = math.log10(max(10.0, max((row.until for row in rows), default=10.0)))
    room = WIDTH - 24
    scale = room / max(most - least, 0.5)
    drawn = []
    for index, row in enumerate(rows):
        y = index * 46 + 34
        at = 12 + min(room, max(0.0, (math.log10(max(1.0, row.seconds)) - least) * scale))
        end = 12 + min(room, max(0.0, (math.log10(max(1.0, row.until)) - least) * scale))
        drawn += [
            _TEXT.format(kind="label", x=0, y=y - 16, text=row.label),
            _TEXT.format(kind="value end", x=WIDTH, y=y - 16, text=row.shown),
            _LINE.format(kind="track-line", x1=6, y1=y, x2=WIDTH - 6, y2=y),
            _LINE.format(kind="span", x1=at, y1=y, x2=end, y2=y),
            _DOT.format(kind="dot", x=at, y=y, r=6),
        ]
    return _svg(name, title, said, max(1, len(rows)) * 46, drawn)


def nice_maximum(value: int) -> int:
    """Return the first of 2, 4, 10, 20, 40, 100, ... that is not below a value."""
    size = 1
    while True:
        for step in (2, 4, 10):
            if value <= step * size:
                return step * size
        size *= 10


def _svg(name: str, title: str, said: str, height: int, drawn: Sequence[Markup]) -> Markup:
    inside = Markup("").join(drawn)
    return _SVG.format(width=WIDTH, height=height, id=name, title=title, said=said, inside=inside)
