"""What is drawn: plots, the journey of an order."""

from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree as ET

import pytest

from domain.statuses import Status
from service.pages import charts as plots
from service.pages.charts import Bar, Column, Span, nice_maximum
from service.pages.order import stages

NASTY = '<script>"&'
AT = datetime(2026, 1, 31, tzinfo=UTC)


def drawn(text: str) -> ET.Element:
    """The elements of a plot; it is well-formed whatever the words in it are."""
    return ET.fromstring(text)  # noqa: S314 - made here


def numbers(plot: ET.Element, tag: str, attribute: str, kind: str) -> list[float]:
    """An attribute of every element of one kind."""
    return [float(one.get(attribute, "")) for one in plot.iter(tag) if one.get("class", "").startswith(kind)]


def test_a_longer_bar_has_a_larger_value() -> None:
    """None that has a value is out of sight, each leads where it should, and words stay words."""
    rows = [
        Bar("a", 100, "100", "go", "/track?a=1&b=2"),
        Bar(NASTY, 50, "50", "bad"),
        Bar("c", 0.001, "0", "rest"),
    ]
    plot = drawn(plots.bars("x", NASTY, "said", rows))
    first, second, third = numbers(plot, "rect", "width", "bar")
    assert first > second > third > 0
    assert [one.get("href") for one in plot.iter("a")] == ["/track?a=1&b=2"]
    assert plot.findtext("title") == NASTY
    assert NASTY in [one.text for one in plot.iter("text")]
    assert plot.get("aria-labelledby") == "x-title x-desc"


def test_columns_have_a_part_for_each_count() -> None:
    """A larger count is a higher part, and an absent one is not drawn."""
    rows = [Column("12:00", "12:00", [("advanced", 10), ("late", 0), ("refused", 5)]), Column("12:01", "", [])]
    plot = drawn(plots.columns("x", "t", "s", rows))
    advanced, refused = numbers(plot, "rect", "height", "column")
    assert advanced > refused > 0
    assert [one.findtext("title") for one in plot.findall("rect")] == ["12:00: 10", "12:00: 5"]
    assert "12:00" in [one.text for one in plot.iter("text")]


def test_spans_begin_and_end_by_their_times() -> None:
    """A longer time is further on, and nothing leaves the plot."""
    rows = [Span("a", 10, 100, "10 s"), Span("b", 100, 1_000, "100 s"), Span("c", 0.5, 0.5, "0 s")]
    plot = drawn(plots.spans("x", "t", "s", rows))
    dots, ends = numbers(plot, "circle", "cx", "dot"), numbers(plot, "line", "x2", "span")
    assert dots[2] <= dots[0] < dots[1]
    assert ends[0] < ends[1]
    assert all(0 <= x <= plots.WIDTH for x in dots + ends)


@pytest.mark.parametrize("draw", [plots.bars, plots.columns, plots.spans])
def test_nothing_can_be_drawn(draw: "type[object]") -> None:
    """An empty plot is one, too."""
    assert drawn(str(draw("x", "t", "s", []))).tag == "svg"  # type: ignore[call-arg]  # any of the three


@pytest.mark.parametrize(
    ("value", "most"), [(0, 2), (2, 2), (3, 4), (5, 10), (11, 20), (99, 100), (101, 200), (4_001, 10_000)]
)
def test_a_scale_ends_at_a_round_number(value: int, most: int) -> None:
    assert nice_maximum(value) == most


def journey(*reached: Status, now: Status | None = None) -> dict[str, str]:
    """The state of each stage of an order that came to these, one an hour."""
    times = {str(status): AT + timedelta(hours=hour) for hour, status in enumerate(reached)}
    return {stage.status: stage.state for stage in stages(now or (reached[-1] if reached else None), times)}


def test_a_journey_tells_reached_skipped_and_ahead() -> None:
    assert journey("submitted", "picked_up") == {
        "submitted": "reached", "packed": "skipped", "picked_up": "now", "in_transit": "ahead",
        "out_for_delivery": "ahead", "delivered": "ahead", "completed": "ahead",
    }  # fmt: skip
    assert set(journey().values()) == {"ahead"}


def test_what_lies_beside_the_path_stands_where_it_happened() -> None:
    """A problem between two stages; and what ended an order has nothing ahead of it."""
    assert [*journey("in_transit", "problem", "delivered")][3:5] == ["in_transit", "problem"]
    assert journey("submitted", "cancelled") == {"submitted": "reached", "cancelled": "now"}
    assert journey("problem")["problem"] == "now"
