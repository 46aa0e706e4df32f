"""The pages in a headless Chromium that reads from a running service."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit
from zoneinfo import ZoneInfo

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import APIRequestContext, Browser, Page, Playwright, expect

from service.features.pages.render import ASSETS, SECURITY_POLICY
from tests.acceptance.conftest import MILLISECONDS_MAX
from tests.support.commands import call_command
from tests.support.folders import copied_folder
from tests.support.processes import RunningService, measured_service
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("all_features")

SECRET: Final = "a-secret-of-16-characters"  # noqa: S105 - of a service that lives for this module
ORDER: Final = "KOM-1"
HOSTILE: Final = '<img src=x onerror="alert(1)">/%2F?#{x}\u202e 100%'
HOSTILE_PATH: Final = f"/track/{quote(HOSTILE, safe='')}"
PAGES: Final = (
    "/", f"/track/{ORDER}", f"/track/{ORDER}?version=2", HOSTILE_PATH, f"/track/{ORDER}/reports/1", "/track",
    "/track?verdict=refused", "/quarantined", "/quarantined/1", "/quarantined/2", "/operations",
    "/conflicts", "/conflicts?handled=false", "/words", "/deliveries", "/verify",
)  # fmt: skip

BINARY: Final = b"<script>alert(1)</script>\x00\xff" + bytes(range(256)) * 2

# Order number, airway bill and status of each report: an order with every verdict, one with hostile texts, and
# three plain ones.
HISTORY: Final = [
    (ORDER, "", "Diajukan"),
    (ORDER, "", "Diajukan"),
    (ORDER, "AWB-1", "Dikirim"),
    (ORDER, "AWB-1", "Dijemput"),
    (ORDER, "AWB-1", "Antar Ulang"),
    (ORDER, "AWB-1", "Dibatalkan"),
    (ORDER, "AWB-2", "Diantar"),
    (HOSTILE, "<b>AWB</b>", "Dikirim"),
    (HOSTILE, "<b>AWB</b>", "<script>alert(1)</script>"),
    *((f"KOM-2{number}", "AWB-SHARED", "Diterima") for number in range(3)),
]

# Visible texts whose contrast to their background is below 4.5, the minimum of WCAG 2 (AA). axe-core does not
# check the texts of charts.
LOW_CONTRAST: Final = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const parse = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((one) => one / 255)
    .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, index) => sum + one * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest(".hidden, .skip")) continue;
    const { color, fill } = getComputedStyle(element);
    const [one, other] = [light(parse(element instanceof SVGElement ? fill : color)), light(behind(element))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < 4.5) low.push(`${ratio.toFixed(2)} ${element.outerHTML}`);
  }
  return low;
}"""

# Texts that the mark of the live connection covers, now and after scrolling to the middle and to the end.
COVERED: Final = """() => {
  const live = document.getElementById("live");
  const covered = [];
  for (const part of [0, 0.5, 1]) {
    scrollTo({ top: part * document.documentElement.scrollHeight, behavior: "instant" });
    const mark = live.getBoundingClientRect();
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      const { parentElement } = texts.currentNode;
      if (live.contains(parentElement) || parentElement.closest(".hidden, .skip")) continue;
      const range = document.createRange();
      range.selectNodeContents(texts.currentNode);
      const isCovered = [...range.getClientRects()].some((text) => text.left < mark.right
        && text.right > mark.left && text.top < mark.bottom && text.bottom > mark.top);
      if (isCovered && texts.currentNode.data.trim()) covered.push(texts.currentNode.data);
    }
  }
  return covered;
}"""


@dataclass
class PageMonitor:
    """Collects console errors, dialogs and requests to other hosts, which no other assertion covers."""

    host: str
    problems: list[str] = field(default_factory=list)

    def follow(self, page: Page) -> None:
        page.on(
            "console", lambda entry: self._record(entry.text) if entry.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self._record(str(error)))
        page.on("dialog", lambda dialog: self._record(f"a dialog: {dialog.message}"))
        page.on("request", lambda request: self._check_host(request.url))

    def _check_host(self, url: str) -> None:
        if urlsplit(url).netloc != self.host:
            self._record(f"a request to another host: {url}")

    def _record(self, text: str) -> None:
        # The browser logs this for each page with a status of a problem.
        if not re.search("the server responded with a status of 4", text):
            self.problems.append(text)


@pytest.fixture(scope="module")
def shop(state_template: Path) -> Iterator[RunningService]:
    """Run a service for this module alone, because its tests count orders."""
    with (
        copied_folder(state_template) as copy,
        measured_service(
            copy, SHARE_SECRET=SECRET, SUBSCRIPTION_NETWORKS="127.0.0.0/8", SUBSCRIPTION_RETRY_SECONDS="0,600"
        ) as service,
    ):
        yield service


@pytest.fixture(scope="module")
def api(playwright: Playwright, shop: RunningService) -> Iterator[APIRequestContext]:
    """Send the history, and return an HTTP client without a browser."""
    context = playwright.request.new_context(base_url=shop.url)
    position = [send(context, *report) for report in HISTORY][-1]
    send_body(context, b'{"order_no":"KOM-3","state":"Dikirim"}')
    send_body(context, BINARY)
    assert context.get(f"/statistics?after_position={position}").ok
    # Nothing listens there: every order is held, with its error.
    subscription = {"url": "http://127.0.0.1:9/hooks", "verdicts": [], "from_position": 0}
    added = context.post("/subscriptions", data=subscription).json()
    path = f"/subscriptions/{added['subscription_id']}"
    until(lambda: context.get(path).json()["failed"] >= len({order_no for order_no, _, _ in HISTORY}))
    yield context
    context.dispose()


Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, shop: RunningService, api: APIRequestContext) -> Iterator[Open]:
    """Return a function that opens each page in a separate browser context.

    At the end, no page may have recorded a problem.
    """
    del api
    yield from opening(browser, shop.url)


def opening(browser: Browser, url: str) -> Iterator[Open]:
    monitor = PageMonitor(urlsplit(url).netloc)
    contexts = []

    def open_page(path: str, **options: Any) -> Page:
        settings = {"locale": "en-GB", "timezone_id": "Asia/Makassar", **options}
        context = browser.new_context(base_url=url, **settings)
        context.set_default_timeout(MILLISECONDS_MAX)
        context.add_init_script(
            "addEventListener('securitypolicyviolation', (event) => console.error(event.blockedURI))"
        )
        contexts.append(context)
        page = context.new_page()
        monitor.follow(page)
        page.goto(path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert monitor.problems == []


def send(api: APIRequestContext, order_no: str, cnote: str, status: str) -> int:
    """Send a report and return its position."""
    response = api.put("/webhook", data={"order_no": order_no, "cnote": cnote, "status": status})
    position: int = response.json()["position"]
    return position


def send_body(api: APIRequestContext, body: bytes) -> None:
    assert api.put("/webhook", data=body).json()["outcome"] == "quarantined"


def search(page: Page, text: str) -> None:
    page.get_by_role("searchbox").fill(text)
    page.get_by_role("button", name="Search").click()


def entries(page: Page) -> list[str]:
    return page.locator(".timeline h3").all_inner_texts()


def test_an_order_is_found_by_its_number_and_by_any_airway_bill(opened: Open) -> None:
    """A search with one result opens the order, one with several shows a list, and one without results reports
    it.
    """
    page = opened("/")
    for text in (ORDER, "AWB-1", "AWB-2", f" {ORDER} "):
        search(page, text)
        expect(page).to_have_url(re.compile(f"/track/{ORDER}$"))
        expect(page.get_by_role("heading", level=1)).to_have_text(ORDER)
    search(page, "AWB-SHARED")
    expect(page.locator("#orders .order-link")).to_have_text(["KOM-22", "KOM-21", "KOM-20"])
    search(page, "kom-1")
    expect(page.get_by_text("No orders found.")).to_be_visible()


def test_a_timeline_needs_no_javascript(opened: Open) -> None:
    """Without scripts, a timeline has statuses, times, durations, verdicts, reasons and raw reports."""
    page = opened(f"/track/{ORDER}", java_script_enabled=False)
    assert entries(page) == [
        "Submitted", "In transit", "Picked up", "Antar Ulang", "Cancelled", "Out for delivery",
    ]  # fmt: skip
    expect(page.locator(".timeline .mark")).to_have_text(["Out of order", "Unrecognised", "Conflicting"])
    expect(page.locator(".entry.refused .reason")).to_have_text(
        "“Cancelled” contradicts “In transit”, which was already reported. The status remains: In transit"
    )
    expect(page.locator("#v1")).to_contain_text("Repeated 1×, last")  # noqa: RUF001 - the text of the page
    expect(page.locator("#v3")).to_contain_text("Not reported in between: Packed, Picked up")
    expect(page.locator("#v3 .spent")).to_contain_text("in this status")
    expect(page.locator("#v7 .spent")).to_contain_text("so far")
    expect(page.locator("#v7 .entry-time")).to_have_text(re.compile(r"^\d+ \w{3} \d{4}, \d\d:\d\d WIB$"))
    expect(page.locator("#v7")).to_contain_text("AWB-2")
    expect(page.locator(".rail .now")).to_contain_text("Out for delivery")
    page.locator("#v6").get_by_role("link", name="Raw report").click()
    body = f'{{"order_no":"{ORDER}","cnote":"AWB-1","status":"Dibatalkan"}}'
    expect(page.locator("pre.body")).to_have_text(body)
    expect(page.locator(".fields")).to_contain_text("cancelled contradicts in_transit")


def test_an_order_is_shown_at_an_earlier_version(opened: Open) -> None:
    """A link, the slider, and a form without JavaScript lead to a version and back to the current one."""
    page = opened(f"/track/{ORDER}")
    page.locator("#v3").get_by_role("link", name="View at this point").click()
    expect(page.locator(".banner.past")).to_contain_text("version 3 of 7")
    assert entries(page) == ["Submitted", "In transit"]
    expect(page.locator(".status-now")).to_contain_text("In transit")
    expect(page.locator(".cnote").first).to_have_text("AWB-1")
    slider = page.get_by_role("slider", name="Version")
    slider.press("ArrowLeft")
    expect(page.locator(".timeline h3")).to_have_text(["Submitted"])
    expect(page).to_have_url(re.compile("version=2$"))
    expect(slider).to_have_attribute("aria-valuetext", "Version 2 of 7")
    slider.press("End")
    expect(page.locator(".timeline h3")).to_have_count(6)
    expect(page.locator(".banner")).to_have_count(0)
    static = opened(f"/track/{ORDER}", java_script_enabled=False)
    static.get_by_role("slider").press("Home")
    static.get_by_role("button", name="Show", exact=True).click()
    expect(static.locator(".banner.past")).to_contain_text("version 1 of 7")
    static.get_by_role("link", name="Back to the current version").first.click()
    expect(static.locator(".banner")).to_have_count(0)


@pytest.mark.parametrize("path", [f"/track/{ORDER}?version=99", "/track/KOM-0", f"/track/{ORDER}/reports/99"])
def test_a_missing_order_version_or_report_has_a_page(opened: Open, path: str) -> None:
    """A missing order, version or report has a page with the heading "Not found" and a link to the overview."""
    page = opened(path)
    expect(page.get_by_role("heading", level=1)).to_have_text("Not found")
    expect(page.get_by_role("link", name="Go to the overview")).to_be_visible()


def test_a_hostile_order_is_shown_unchanged_and_does_nothing(opened: Open) -> None:
    """HTML stays text, a bidi override affects only its own text, and links lead to this order."""
    page = opened("/track")
    page.locator(".order-link", has_text="onerror").click()
    expect(page.get_by_role("heading", level=1).locator("bdi")).to_have_text(HOSTILE, use_inner_text=False)
    expect(page.locator(".unusual code")).to_contain_text(r"{x}\u{202e} 100%")
    assert page.title().startswith(f"\u2068{HOSTILE}\u2069")
    assert page.locator("main img, main script, main b").count() == 0
    assert page.locator("h1 bdi").evaluate("(element) => getComputedStyle(element).unicodeBidi") == "isolate"
    expect(page.locator(".cnote").first).to_have_text("<b>AWB</b>")
    expect(page.locator("#v2 h3")).to_have_text("<script>alert(1)</script>")
    page.get_by_role("link", name="View at this point").click()
    expect(page.locator(".banner.past")).to_be_visible()
    page.get_by_role("link", name="ID", exact=True).click()
    expect(page.locator("#v1 h3")).to_have_text("Dikirim")
    page.goto(f"{HOSTILE_PATH}/reports/2")
    expect(page.locator("#report h1")).to_contain_text("Laporan 2")
    page.get_by_role("link", name="Kembali ke pesanan").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(HOSTILE, use_inner_text=False)


def test_reports_appear_without_a_reload(opened: Open, api: APIRequestContext) -> None:
    """A new report updates both pages, and the order's page announces it to screen readers and
    keeps the focus.
    """
    send(api, "KOM-4", "AWB-4", "Diajukan")
    order, overview = opened("/track/KOM-4"), opened("/")
    for page in (order, overview):
        expect(page.locator("#live")).to_have_attribute("data-state", "live")
        page.evaluate("window.wasNotReloaded = true")
    focused = order.locator("#v1").get_by_role("link", name="Raw report")
    focused.focus()
    before = int(overview.locator(".tile strong").first.inner_text())
    send(api, "KOM-4", "AWB-4", "Diantar")
    send(api, "KOM-5", "", "Diajukan")
    expect(order.locator(".timeline h3")).to_have_text(["Submitted", "Out for delivery"])
    expect(order.locator(".status-now")).to_contain_text("Out for delivery")
    expect(order.locator("#v2")).to_have_class(re.compile("is-new"))
    expect(order.get_by_role("status")).to_have_text("New report: Diantar")
    expect(order.get_by_role("slider")).to_have_js_property("value", "2")
    expect(focused).to_be_focused()
    expect(overview.locator(".tile strong").first).to_have_text(str(before + 1))
    for page in (order, overview):
        assert page.evaluate("window.wasNotReloaded") is True


def test_the_overview_lists_what_needs_attention(opened: Open, api: APIRequestContext) -> None:
    """The overview's numbers equal the API's, its charts have text descriptions, and its lists link to the
    orders.
    """
    page = opened("/")
    statistics = api.get("/statistics").json()
    orders = sum(row["orders"] for row in statistics["statuses"])
    expect(page.locator(".tile strong").first).to_have_text(str(orders))
    expect(page.get_by_role("group", name=re.compile("Orders by status"))).to_contain_text("Delivered 3")
    expect(page.locator("#contradictions")).to_contain_text("“Cancelled” contradicts “In transit”")
    expect(page.locator("#unknown")).to_contain_text("<script>alert(1)</script>")
    expect(page.locator("#quarantine")).to_contain_text("status is missing")
    page.get_by_role("group", name=re.compile("Orders by status")).get_by_role("link", name="Delivered 3")
    expect(page.locator("#stuck")).to_contain_text("No stuck orders.")
    expect(page.locator("#projections .ok")).to_have_count(3)
    page.locator("#per-minute summary").click()
    expect(page.locator("#per-minute table")).to_be_visible()
    page.locator("#contradictions .order-link").first.click()
    expect(page.get_by_role("heading", level=1)).to_have_text(ORDER)


def test_lists_are_filtered_and_paged(opened: Open, api: APIRequestContext) -> None:
    """A page has fifty orders and a link to the next page, and a filter shows only its orders."""
    for number in range(51):
        send(api, f"KOM-6{number:02}", "", "Hilang")
    page = opened("/track?status=lost")
    expect(page.locator("#orders tbody tr")).to_have_count(50)
    expect(page.locator("#count")).to_have_text("Orders: 51")
    page.get_by_role("link", name="Next page").click()
    expect(page.locator("#orders .order-link")).to_have_text(["KOM-600"])
    page.get_by_role("link", name="Conflicting", exact=True).click()
    expect(page.locator("#orders .order-link")).to_have_text([ORDER])
    expect(page.locator("#count")).to_have_text("Orders: 1")


def test_the_list_has_the_newest_change_first(opened: Open, api: APIRequestContext) -> None:
    """The order that was reported last is on top, under column heads that name what the list shows."""
    send(api, "KOM-80", "AWB-80", "Diajukan")
    send(api, "KOM-81", "AWB-81", "Diajukan")
    position = send(api, "KOM-80", "AWB-80", "Dikirim")
    page = opened(f"/track?after_position={position}")
    expect(page.locator("#orders .order-link").first).to_have_text("KOM-80")
    table = page.get_by_role("table")
    assert table.get_by_role("columnheader").all_inner_texts() == [
        "Order", "Status", "Airway bill (AWB)", "First report", "Last report",
    ]  # fmt: skip
    row = table.get_by_role("row", name="KOM-80")
    expect(row.get_by_role("cell").nth(0)).to_contain_text("In transit")
    expect(row.get_by_role("cell").nth(1)).to_have_text("AWB-80")
    narrow = opened(f"/track?after_position={position}", viewport={"width": 390, "height": 800})
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 390
    expect(narrow.get_by_role("row", name="KOM-80")).to_contain_text("AWB-80")
    expect(narrow.get_by_role("columnheader")).to_have_count(5)


@pytest.mark.parametrize("options", [{}, {"java_script_enabled": False}], ids=["scripts", "no scripts"])
def test_a_form_filters_the_list_and_the_button_downloads_it(
    opened: Open, api: APIRequestContext, options: dict[str, Any]
) -> None:
    """The form needs no scripts, leads to a short URL, and keeps its values; the CSV has the same orders."""
    statuses = ("Dijemput", "Rusak", "Dibatalkan")
    for number in range(60):
        position = send(api, f"FORM-{number:02}", "", statuses[number % 3])
    assert api.get(f"/orders?limit=1&after_position={position}").ok
    page = opened("/track", **options)
    page.locator("#finder summary").click()
    page.get_by_label("Number or AWB begins with").fill("FORM-")
    page.get_by_label("Picked up").check()
    page.get_by_label("Damaged").check()
    page.get_by_role("button", name="Apply").click()
    expect(page).to_have_url(re.compile(r"/track\?search=FORM-&status=picked_up%2Cdamaged$"))
    expect(page.locator("#count")).to_have_text("Orders: 40")
    expect(page.locator("#orders tbody tr")).to_have_count(40)
    expect(page.get_by_label("Number or AWB begins with")).to_have_value("FORM-")
    expect(page.get_by_label("Damaged")).to_be_checked()
    expect(page.get_by_label("Lost")).not_to_be_checked()
    page.get_by_label("Journey").select_option("Ended")
    page.get_by_label("Last report from").fill("2020-01-31")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator("#count")).to_have_text("Orders: 20")
    with page.expect_download() as started:
        page.get_by_role("link", name="Download CSV").click()
    assert started.value.suggested_filename == "orders.csv"
    lines = started.value.path().read_text(encoding="utf-8-sig").splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [f"FORM-{number:02}" for number in range(58, 0, -3)]
    page.get_by_label("to", exact=True).fill("2020-02-01")
    page.get_by_role("button", name="Apply").click()
    expect(page.get_by_text("No orders match.")).to_be_visible()
    page.get_by_role("link", name="Clear the filter").click()
    expect(page).to_have_url(re.compile("/track$"))


def test_a_search_lists_the_orders_that_begin_with_it(opened: Open, api: APIRequestContext) -> None:
    """A number that no order has is taken as the beginning of one; a single result opens the order."""
    for number in (80, 81):
        send(api, f"BEGIN-{number}", "", "Diajukan")
    position = send(api, "BEGIN-9", "", "Diajukan")
    assert api.get(f"/orders?limit=1&after_position={position}").ok
    page = opened("/")
    search(page, "BEGIN-")
    expect(page.locator("#orders .order-link")).to_have_text(["BEGIN-9", "BEGIN-81", "BEGIN-80"])
    search(page, "BEGIN-9")
    expect(page).to_have_url(re.compile("/track/BEGIN-9$"))


@pytest.mark.parametrize(
    ("query", "name"),
    [("from=yesterday", "from"), ("to=9999-12-31", "to"), ("status=x", "status"), ("cursor=MQ", "cursor")],
)
def test_a_list_names_the_invalid_filter(api: APIRequestContext, query: str, name: str) -> None:
    """A filter that cannot be used gets 400, and the problem names it."""
    problem = api.get(f"/track?{query}")
    assert (problem.status, problem.json()["parameter"]) == (400, name)


def test_the_quarantine_shows_bodies_and_commands(opened: Open, api: APIRequestContext) -> None:
    """The quarantine has a list by state, each body as text if possible and as a hex dump, and
    commands for it.
    """
    page = opened("/")
    page.locator("#quarantine").get_by_role("link", name="Show all").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Quarantine")
    page.get_by_role("navigation", name="Main navigation").get_by_role("link", name="Quarantine").click()
    expect(page.locator(".nav [aria-current]")).to_have_text("Quarantine")
    expect(page.locator(".rows li")).to_have_count(2)
    page.get_by_role("link", name="#1", exact=True).click()
    expect(page.locator("pre.body")).to_have_text('{"order_no":"KOM-3","state":"Dikirim"}')
    expect(page.locator("pre.command").first).to_have_text("order-tracking quarantine retry 1")
    page.get_by_text("Hex dump").click()
    expect(page.locator("pre.dump")).to_contain_text(
        '000000  7b 22 6f 72 64 65 72 5f 6e 6f 22 3a 22 4b 4f 4d  {"order_no":"KOM'
    )
    page.get_by_role("link", name="Back to the quarantine").click()
    page.get_by_role("link", name="#2", exact=True).click()
    expect(page.locator("pre.body")).to_have_count(0)
    expect(page.locator("pre.dump")).to_contain_text(
        "000010  3c 2f 73 63 72 69 70 74 3e 00 ff 00 01 02 03 04  </script>......."
    )
    page.goto("/quarantined?state=discarded")
    expect(page.get_by_text("The quarantine is empty.")).to_be_visible()
    assert "Karantina #1" in api.get("/quarantined/1?lang=id").text()
    missing = api.get("/quarantined/99", headers={"Accept": "text/html"})
    assert missing.status == 404
    assert missing.headers["x-request-id"] in missing.text()


def test_a_long_timeline_is_shown_by_pages(opened: Open, api: APIRequestContext) -> None:
    """The first page of a long timeline has the newest entries, with links to the earlier ones and back."""
    for number in range(52):
        send(api, "KOM-7", "", ("Dikirim", "Diantar")[number % 2])
    page = opened("/track/KOM-7")
    expect(page.locator(".entry")).to_have_count(50)
    expect(page.locator(".entry").last).to_have_attribute("id", "v52")
    page.get_by_role("link", name="Show earlier reports").click()
    expect(page.locator(".entry")).to_have_count(2)
    page.get_by_role("link", name="Back to the latest reports").click()
    expect(page.locator(".entry")).to_have_count(50)


def test_the_language_is_the_browsers_until_another_is_chosen(opened: Open) -> None:
    """The chosen language also applies to the next pages, and to their times."""
    assert opened("/", locale="de-DE").locator("html").get_attribute("lang") == "id"
    page = opened(f"/track/{ORDER}?version=3")
    expect(page.locator("html")).to_have_attribute("lang", "en")
    page.get_by_role("link", name="ID", exact=True).click()
    expect(page.locator(".banner.past")).to_contain_text("versi 3 dari 7")
    page.get_by_role("link", name="Ringkasan").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Ringkasan")
    expect(page.locator("#zone")).to_have_text("Semua waktu dalam zona waktu Asia/Jakarta, WIB (UTC+7).")


def test_every_time_is_in_the_time_zone_of_the_settings(opened: Open, api: APIRequestContext) -> None:
    """With and without scripts, times, axes and tables are in one time zone, which the page names."""
    report = api.get(f"/orders/{ORDER}/events").json()["events"][-1]
    received_at = datetime.fromisoformat(report["data"]["timestamp"]).astimezone(ZoneInfo("Asia/Jakarta"))
    clock = f"{received_at:%H:%M}"
    for has_scripts in (True, False):
        page = opened(f"/track/{ORDER}", java_script_enabled=has_scripts, timezone_id="America/New_York")
        time = page.locator("#v7 .entry-time time")
        expect(time).to_have_text(f"{received_at.day} {received_at:%b %Y}, {clock} WIB")
        expect(time).to_have_attribute("title", re.compile(rf", {received_at:%H:%M:%S} WIB \(UTC\+7\)$"))
        expect(page.locator(".rail .now time")).to_have_text(f"{received_at.day} {received_at:%b}, {clock}")
        expect(page.locator("#zone")).to_have_text("All times are in the time zone Asia/Jakarta, WIB (UTC+7).")
        page.goto("/")
        expect(page.locator("#per-minute tbody th", has_text=clock)).to_have_count(1)
        title = f"{received_at.day} {received_at:%b %Y}, {clock} WIB, Conflicting: "
        expect(page.locator("#per-minute .plot .refused title")).to_contain_text([title])
        expect(page.locator("#per-day tbody th").last).to_have_text(f"{received_at.day} {received_at:%b}")


def test_a_raw_report_opens_over_the_page_and_closes_by_the_keyboard(opened: Open) -> None:
    """With scripts, a dialog shows the report, and on close the focus returns to its link."""
    page = opened(f"/track/{ORDER}")
    page.locator("#v6").get_by_role("link", name="Raw report").press("Enter")
    dialog = page.get_by_role("dialog", name=re.compile("Report 6"))
    expect(dialog).to_contain_text('"status":"Dibatalkan"')
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator("#v6").get_by_role("link", name="Raw report")).to_be_focused()


@pytest.mark.parametrize(("locale", "scheme"), [("id-ID", "light"), ("en-GB", "dark")])
def test_every_page_can_be_read_on_a_phone_in_light_and_dark(opened: Open, locale: str, scheme: str) -> None:
    """Pages fit the width, texts have enough contrast, and landmarks and headings are complete.

    The test takes about 7 s, because the browser opens every page.
    """
    page = opened("/", locale=locale, color_scheme=scheme, viewport={"width": 360, "height": 740})
    for path in PAGES:
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
        assert page.evaluate(LOW_CONTRAST) == [], path
        expect(page.get_by_role("main")).to_have_count(1)
        expect(page.get_by_role("heading", level=1)).to_have_count(1)
        for name in ("banner", "search", "contentinfo"):
            expect(page.get_by_role(name, exact=True)).to_have_count(1)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 20, 27)"
    assert dark == (scheme == "dark")


def findings(page: Page) -> list[tuple[str, str]]:
    """Return what axe-core finds on a page: the rule and the element."""
    violations = Axe().run(page).response["violations"]
    return [(rule["id"], node["html"]) for rule in violations for node in rule["nodes"]]


@pytest.mark.parametrize(
    ("locale", "scheme", "width"),
    [("id-ID", "light", 390), pytest.param("en-GB", "dark", 1_180, marks=pytest.mark.long)],
)
def test_axe_finds_nothing(opened: Open, locale: str, scheme: str, width: int) -> None:
    """axe-core finds nothing on any page, with details and dialogs open, in light and dark.

    The test takes about 13 s, because axe-core checks every page.
    """
    page = opened("/", locale=locale, color_scheme=scheme, viewport={"width": width, "height": 844})
    for path in (*PAGES, "/track?q=KOM-0", "/track/KOM-0", "/quarantined?state=discarded"):
        page.goto(path)
        if page.locator("#live").count():
            expect(page.locator("#live")).to_have_attribute("data-state", "live")
        for summary in page.locator("summary:visible").all():
            summary.click()
        assert findings(page) == [], path
    page.goto(f"/track/{ORDER}")
    page.locator("#v6 a[data-raw]").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert findings(page) == []


@pytest.mark.parametrize("width", [360, 390])
def test_the_live_mark_covers_no_text(opened: Open, width: int) -> None:
    """On a phone, the mark of the connection covers no text, wherever the page is scrolled to."""
    page = opened("/", locale="id-ID", viewport={"width": width, "height": 844})
    for path in ("/", f"/track/{ORDER}", HOSTILE_PATH):
        page.goto(path)
        expect(page.locator("#live")).to_have_attribute("data-state", "live")
        for state in ("connecting", "live", "lost"):
            page.locator("#live").evaluate("(live, state) => { live.dataset.state = state; }", state)
            assert page.evaluate(COVERED) == [], (path, state)
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_problem_leads_back(opened: Open) -> None:
    """A page of a problem leads back to the page before it, after a failed form to its entry."""
    page = opened("/quarantined/1")
    page.get_by_role("button", name="Record as a report").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Still not understood")
    expect(page.locator("main")).to_contain_text("status is missing")
    page.get_by_role("link", name="Back to quarantine #1").click()
    page.get_by_label("Reason").fill(" ")
    page.get_by_role("button", name="Discard").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Invalid request")
    page.get_by_role("link", name="Back to quarantine #1").click()
    expect(page).to_have_url(re.compile("/quarantined/1$"))
    page.goto("/track?status=delivered")
    page.evaluate("location.assign('/track/KOM-0')")
    page.get_by_role("link", name="Back to the previous page").click()
    expect(page).to_have_url(re.compile(r"/track\?status=delivered$"))
    page.goto("/track/KOM-0")
    expect(page.get_by_role("link", name="Go to the overview")).to_be_visible()
    expect(page.get_by_role("link", name="Back to the previous page")).to_have_count(0)
    page.get_by_role("link", name="ID", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Tidak ditemukan")
    expect(page.get_by_role("link", name="Kembali ke halaman sebelumnya")).to_have_count(0)


@pytest.mark.parametrize(
    ("locale", "scheme", "width"),
    [("id-ID", "light", 1180), ("en-GB", "dark", 1180), ("id-ID", "dark", 390), ("en-GB", "light", 390)],
)
def test_a_buyer_reads_one_order(opened: Open, locale: str, scheme: str, width: int) -> None:
    """From an order's page, a button opens the buyer's page, which fits, is readable, and has no other link."""
    is_english = locale == "en-GB"
    size = {"width": width, "height": 844}
    page = opened(f"/track/{ORDER}", locale=locale, color_scheme=scheme, viewport=size)
    name = "Make a page for the buyer" if is_english else "Buat halaman untuk pembeli"
    page.get_by_role("button", name=name).click()
    expect(page).to_have_url(re.compile(r"/t/[\w-]+$"))
    expect(page.get_by_role("heading", level=1)).to_have_text(ORDER)
    expect(page.locator(".status-now")).to_have_text("Out for delivery" if is_english else "Diantar")
    explanation = "The courier is bringing the parcel to your address."
    expect(page.get_by_text(explanation)).to_have_count(int(is_english))
    shown = (
        ["Out for delivery", "In transit", "Submitted"] if is_english else ["Diantar", "Dikirim", "Diajukan"]
    )
    assert entries(page) == shown
    expect(page.locator(".rail .now")).to_contain_text(shown[0])
    for path in (page.url, f"/t/{'A' * 40}"):
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(LOW_CONTRAST) == []
        assert findings(page) == []
        links = page.locator("a").evaluate_all("(all) => all.map((one) => one.getAttribute('href'))")
        assert links == ["?lang=id", "?lang=en"]
        assert page.locator("script, form, input, iframe").count() == 0
        expect(page.get_by_role("main")).to_have_count(1)
        expect(page.get_by_role("heading", level=1)).to_have_count(1)
    page.go_back()
    page.get_by_role("link", name="ID" if is_english else "EN", exact=True).click()
    expect(page.locator(".status-now")).to_have_text("Diantar" if is_english else "Out for delivery")
    assert page.context.cookies() == []


def test_the_keyboard_reaches_the_content(opened: Open) -> None:
    """The first focus stop is a link to the content, the next one is in the content, and the focus
    is visible.
    """
    page = opened(f"/track/{ORDER}")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to main content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    page.keyboard.press("Tab")
    focused = page.locator(":focus")
    expect(page.get_by_role("main").locator(":focus")).to_have_count(1)
    assert focused.evaluate("(element) => getComputedStyle(element).outlineWidth") == "3px"
    tree = page.get_by_role("main").aria_snapshot()
    for line in (
        f'heading "{ORDER}" [level=1]',
        'heading "Timeline" [level=2]',
        'heading "Cancelled"',
        "slider",
    ):
        assert line in tree


@pytest.fixture
def locked(service: RunningService, state_dir: Path, playwright: Playwright) -> tuple[str, str]:
    """Return the URL of a service that requires keys, and a key."""
    key = call_command(state_dir, "keys", "create", "people").stdout.split()[-1]
    api = playwright.request.new_context(base_url=service.url)
    # The service checks for new keys once a second.
    until(lambda: api.get("/track").status == 401)
    api.dispose()
    return service.url, key


def test_a_key_is_requested_once(browser: Browser, playwright: Playwright, locked: tuple[str, str]) -> None:
    """A valid key goes into a cookie that scripts cannot read, and opens pages and streams until sign-out."""
    url, key = locked
    opens = opening(browser, url)
    page = next(opens)("/track?status=lost")
    expect(page.get_by_role("heading", level=1)).to_have_text("API key required")
    for value in ("otk_wrong", key):
        page.get_by_label("API key", exact=True).fill(value)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_have_count(1 if value != key else 0)
    expect(page).to_have_url(f"{url}/track?status=lost")
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["secure"]) == (True, "Strict", False)
    assert page.evaluate("document.cookie") == ""
    page.goto("/")
    expect(page.get_by_text("No reports yet")).to_be_visible()
    expect(page.locator("#live")).to_have_attribute("data-state", "live")
    api = playwright.request.new_context(base_url=url)
    send(api, ORDER, "", "Dikirim")
    api.dispose()
    expect(page.locator(".tile strong").first).to_have_text("1")
    expect(page.get_by_text("No reports yet")).to_have_count(0)
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("API key required")
    next(opens, None)


def test_the_form_for_the_key_shows_how_to_create_one(
    browser: Browser, locked: tuple[str, str], state_dir: Path
) -> None:
    """The command of the form creates a key for its page, and axe-core finds nothing on the form."""
    url, _ = locked
    opens = opening(browser, url)
    page = next(opens)("/operations")
    for scope, path in (("read", "/track"), ("admin", "/operations")):
        page.goto(path)
        page.get_by_label("API key", exact=True).fill("otk_wrong")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_be_visible()
        page.locator("summary").click()
        assert findings(page) == []
        commands = [
            " ".join(text.replace("\\\n", " ").split())
            for text in page.locator("pre.command").all_inner_texts()
        ]
        create = f"order-tracking keys create NAME --scope {scope} --days 365"
        assert [command.endswith(create) for command in commands] == [True] * 3
        assert commands[0] == f".venv/bin/{create}"
        arguments = commands[0].replace("NAME", scope).split()[1:]
        page.get_by_label("API key", exact=True).fill(call_command(state_dir, *arguments).stdout.split()[-1])
        page.get_by_role("button", name="Sign in").click()
        expect(page).to_have_url(f"{url}{path}")
        expect(page.locator(".nav [aria-current]")).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
    next(opens, None)


def test_a_form_without_a_session_leads_back_to_its_page(
    browser: Browser, playwright: Playwright, locked: tuple[str, str], state_dir: Path
) -> None:
    """If the session has ended, the key leads to the entry, because a form cannot be opened by its address."""
    url, _ = locked
    api = playwright.request.new_context(base_url=url)
    send_body(api, b"{}")
    api.dispose()
    key = call_command(state_dir, "keys", "create", "desk", "--scope", "admin").stdout.split()[-1]
    opens = opening(browser, url)
    page = next(opens)("/quarantined/1")
    for _ in range(2):
        page.get_by_label("API key", exact=True).fill(key)
        page.get_by_role("button", name="Sign in").click()
        expect(page).to_have_url(f"{url}/quarantined/1")
        page.context.clear_cookies()
        page.get_by_role("button", name="Record as a report").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("API key required")
    next(opens, None)


def test_a_key_is_accepted_from_the_own_form_only(playwright: Playwright, locked: tuple[str, str]) -> None:
    """Other sites cannot set a key, and the redirect afterwards stays on this service."""
    url, key = locked
    api = playwright.request.new_context(base_url=url)
    form: dict[str, str | float | bool] = {"key": key, "next": "//other.example/"}
    for headers in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://other.example"},
        {"Origin": "null"},
    ):
        assert api.post("/session", form=form, headers=headers).status == 403
    response = api.post("/session", form=form, max_redirects=0)
    assert (response.status, response.headers["location"]) == (303, "/")
    assert api.post("/session", data=b"\xff").status == 400
    api.dispose()


def test_pages_and_files_have_strict_headers(api: APIRequestContext) -> None:
    """Pages have a strict policy and are not cached; files with a version in the URL are cached permanently."""
    for path in (*PAGES, "/track/KOM-0"):
        response = api.get(path, headers={"Accept": "text/html"})
        assert response.headers["content-security-policy"] == SECURITY_POLICY
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "same-origin"
        assert response.headers["server"] == "order-tracking"
    for name, asset in ASSETS.items():
        response = api.get(f"/static/{name}?v={asset.version}")
        assert "immutable" in response.headers["cache-control"]
        again = api.get(f"/static/{name}", headers={"If-None-Match": response.headers["etag"]})
        assert (again.status, again.headers["cache-control"]) == (304, "no-cache")
        assert "http" not in response.text().replace("http://www.w3.org/2000/svg", "")
    assert api.get("/static/pages.py").status == 404
    problem = api.get("/track/KOM-0")
    assert (problem.status, problem.headers["content-type"]) == (404, "application/problem+json")
    assert api.get("/track?page=2").json()["parameter"] == "page"


def test_a_conflicting_report_is_handled(opened: Open, api: APIRequestContext) -> None:
    """An operator notes what was done, at the order or in the list. The report leaves the list of open ones."""
    for status in ("Diterima", "Dibatalkan", "Hilang"):
        position = send(api, "KOM-9 <b>", "AWB-9", status)
    assert api.get(f"/contradictions?after_position={position}").ok
    page = opened("/conflicts?handled=false")
    rows = page.locator("ul.rows > li", has_text="KOM-9 <b>")
    expect(rows).to_have_count(2)
    rows.first.get_by_text("Mark as handled").click()
    rows.first.get_by_label("What you did").fill("asked the courier <i>")
    rows.first.get_by_role("button", name="Save").click()
    expect(page).to_have_url(re.compile(r"/track/KOM-9%20%3Cb%3E#v3$"))
    entry = page.locator("#v3")
    expect(entry).to_contain_text("asked the courier <i>")
    page.locator("#v2").get_by_text("Mark as handled").click()
    page.locator("#v2").get_by_label("What you did").fill("known")
    page.locator("#v2").get_by_role("button", name="Save").click()
    expect(page.locator("#v2")).to_contain_text("Handled")
    page.goto("/conflicts?handled=false")
    expect(page.locator("ul.rows > li", has_text="KOM-9 <b>")).to_have_count(0)
    page.get_by_role("link", name="Handled", exact=True).click()
    expect(page.locator("ul.rows > li", has_text="KOM-9 <b>")).to_have_count(2)


def test_unknown_words_lead_to_what_heals_them(opened: Open) -> None:
    """The overview's card leads to the page with the unknown words, the commands, and the known words."""
    page = opened("/")
    expect(page.locator("#unknown")).to_contain_text("Antar Ulang")
    page.locator("#unknown").get_by_role("link").click()
    expect(page).to_have_url(re.compile(r"/words$"))
    expect(page.locator("#unknown")).to_contain_text("Antar Ulang")
    expect(page.get_by_text("order-tracking rejudge --apply")).to_be_visible()
    expect(page.get_by_role("row", name="Delivered").first).to_contain_text("terkirim")


def test_a_subscription_is_tested_and_its_orders_are_resolved(opened: Open) -> None:
    """The page shows held orders with their errors; its buttons test, retry, skip, pause and resume."""
    page = opened("/deliveries")
    expect(page.get_by_role("link", name="Subscriptions")).to_have_attribute("aria-current", "page")
    held = page.locator("li", has_text="KOM-20")
    expect(held.first).to_contain_text("cannot connect to 127.0.0.1:9")
    page.get_by_role("button", name="Send a test").click()
    expect(page.get_by_role("status").first).to_contain_text("The test failed: cannot connect to 127.0.0.1:9")
    page.locator("li", has_text="KOM-20").get_by_role("button", name="Retry now").click()
    expect(page).to_have_url(re.compile("/deliveries#s"))
    order = page.locator("li", has_text="KOM-21")
    order.get_by_label("Reason").fill("the shop knows")
    order.get_by_role("button", name="Skip").click()
    page.get_by_role("button", name="Pause").click()
    # By then, so many deliveries may have failed that the state has a second part.
    expect(page.get_by_text(re.compile("^Paused.*: by an operator$"))).to_be_visible()
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
