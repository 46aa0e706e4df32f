"""The charts of the overview and the journey of an order."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from domain.statuses import Status
from service.features.pages.charts import (
    WIDTH,
    Bar,
    Column,
    Span,
    draw_bars,
    draw_columns,
    draw_spans,
    round_up,
)
from service.features.pages.order import build_stages
from tests.support.examples import LOCALES

EN = LOCALES["en"]
HOSTILE = '<script>"&'
START = datetime(2026, 1, 31, tzinfo=UTC)


def parse(svg: str) -> ET.Element:
    """Parse a chart; fail if it is not well-formed."""
    return ET.fromstring(svg)  # noqa: S314 - the test made it


def numbers(chart: ET.Element, tag: str, attribute: str, css_class: str) -> list[float]:
    """Return an attribute of every element of a class."""
    return [
        float(element.get(attribute, ""))
        for element in chart.iter(tag)
        if element.get("class", "").startswith(css_class)
    ]


def test_a_larger_value_has_a_longer_bar() -> None:
    """A larger value has a longer bar, the smallest is visible, links keep their targets, and hostile text is
    escaped.
    """
    bars = [
        Bar("a", 100_000, "go", "/track?a=1&b=2"),
        Bar(HOSTILE, 50_000, "bad", ""),
        Bar("c", 1, "muted", ""),
    ]
    chart = parse(draw_bars("by_status", bars, EN))
    first, second, third = numbers(chart, "rect", "width", "bar")
    assert first > second > third >= 2
    assert [link.get("href") for link in chart.iter("a")] == ["/track?a=1&b=2"]
    assert {HOSTILE, "100,000"} <= {text.text for text in chart.iter("text")}


def test_a_chart_is_accessible() -> None:
    """A chart is labelled by its title, and its description has the numbers as text."""
    chart = parse(draw_bars("by_status", [Bar(HOSTILE, 50, "bad", "")], EN))
    assert chart.get("role") == "img"
    ids = [chart[index].get("id") for index in (0, 1)]
    assert chart.get("aria-labelledby", "").split() == ids
    assert [chart[index].text for index in (0, 1)] == ["Orders by status", f"{HOSTILE} 50"]


def test_a_chart_with_links_is_a_group() -> None:
    """Assistive technology reads nothing inside an image, so a chart with links is not one."""
    assert parse(draw_bars("by_status", [Bar("a", 1, "go", "/track?status=a")], EN)).get("role") == "group"


def test_a_column_has_a_part_for_each_count() -> None:
    """A larger count has a taller part, a zero is not drawn, and only columns with a tick have a label."""
    columns = [
        Column("12:00", "1 Feb 2026, 12:00 WIB", {"advanced": 10, "late": 0, "refused": 5}, has_tick=True),
        Column("12:01", "1 Feb 2026, 12:01 WIB", {}, has_tick=False),
    ]
    chart = parse(draw_columns("per_minute", columns, EN))
    advanced, refused = numbers(chart, "rect", "height", "column")
    assert advanced > refused > 0
    assert [part.findtext("title") for part in chart.findall("rect")] == [
        "1 Feb 2026, 12:00 WIB, Advanced: 10",
        "1 Feb 2026, 12:00 WIB, Conflicting: 5",
    ]
    assert {"12:00", "12:01"} & {text.text for text in chart.iter("text")} == {"12:00"}
    assert chart.findtext("desc") == "15 reports"


def test_a_span_begins_and_ends_at_its_times() -> None:
    """A longer time is further to the right, and everything is inside the chart."""
    spans = [Span("a", 10, 100), Span("b", 100, 1_000), Span("c", 0.5, 0.5)]
    chart = parse(draw_spans("time_spent", spans, EN))
    dots, ends = numbers(chart, "circle", "cx", "dot"), numbers(chart, "line", "x2", "span")
    assert dots[2] <= dots[0] < dots[1]
    assert ends[0] < ends[1]
    assert all(0 <= x <= WIDTH for x in dots + ends)


@pytest.mark.parametrize("draw", [draw_bars, draw_columns, draw_spans])
def test_a_chart_may_be_empty(draw: Callable[..., Any]) -> None:
    """An empty chart is a well-formed SVG element."""
    assert parse(draw("by_status", [], EN)).tag == "svg"


@pytest.mark.parametrize(
    ("value", "maximum"), [(0, 2), (2, 2), (3, 4), (5, 10), (11, 20), (99, 100), (101, 200), (4_001, 10_000)]
)
def test_a_scale_ends_at_a_round_number(value: int, maximum: int) -> None:
    """The end of the scale is a round number that is not below the largest value."""
    assert round_up(value) == maximum


def journey(*statuses: Status, now: Status | None = None) -> dict[str, str]:
    """Return the state of each stage of an order that reached these statuses, one an hour."""
    reached_at = {str(status): START + timedelta(hours=hour) for hour, status in enumerate(statuses)}
    status = now or (statuses[-1] if statuses else None)
    return {stage.status: stage.state for stage in build_stages(status, reached_at)}


def test_a_stage_is_reached_skipped_or_ahead() -> None:
    """A stage without a report is skipped before a reached stage, and ahead after the last one."""
    assert journey("submitted", "picked_up") == {
        "submitted": "reached", "packed": "skipped", "picked_up": "now", "in_transit": "ahead",
        "out_for_delivery": "ahead", "delivered": "ahead", "completed": "ahead",
    }  # fmt: skip
    assert set(journey().values()) == {"ahead"}


def test_a_detour_is_where_it_happened() -> None:
    """A problem is between its neighbours in time, and a cancelled order has no stage ahead."""
    assert [*journey("in_transit", "problem", "delivered")][3:5] == ["in_transit", "problem"]
    assert journey("submitted", "cancelled") == {"submitted": "reached", "cancelled": "now"}
    assert journey("problem")["problem"] == "now"
