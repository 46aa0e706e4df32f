"""The page, as a person's browser has it: the machine's Chromium, headless, against a running service."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import pytest
from playwright.sync_api import APIRequestContext, Browser, Page, Playwright, expect, sync_playwright

from service.pages.render import ASSETS, SECURITY_POLICY
from tests.support.commands import call_command
from tests.support.folders import copied_folder
from tests.support.processes import RunningService, measured_service
from tests.support.waiting import PATIENCE_SECONDS, until

CHROMIUM: Final = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS: Final = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MILLISECONDS_MAX: Final = PATIENCE_SECONDS * 1_000
expect.set_options(timeout=MILLISECONDS_MAX)

ORDER: Final = "KOM-1"
HOSTILE: Final = '<img src=x onerror="alert(1)">/%2F?#{x}\u202e 100%'
HOSTILE_PATH: Final = f"/track/{quote(HOSTILE, safe='')}"
PAGES: Final = (
    "/", f"/track/{ORDER}", f"/track/{ORDER}?version=2", HOSTILE_PATH, f"/track/{ORDER}/reports/1", "/track",
    "/track?verdict=refused", "/quarantined", "/quarantined/1", "/quarantined/2",
)  # fmt: skip

BINARY: Final = b"<script>alert(1)</script>\x00\xff" + bytes(range(256)) * 2

# Order number, airway bill, status: an order that meets every verdict, one of hostile words, some quiet ones.
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

# Of each text that is seen: how far its colour is from what lies behind it, by WCAG 2.
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


# Controls that are seen and have neither a text nor a label.
NAMELESS: Final = """() => [...document.querySelectorAll("a, button, input:not([type=hidden])")]
  .filter((one) => one.checkVisibility() && !one.textContent.trim() && !one.labels?.length)
  .map((one) => one.outerHTML)"""


@dataclass
class Watched:
    """What went wrong in a page that no assertion would see."""

    host: str
    complaints: list[str] = field(default_factory=list)

    def follow(self, page: Page) -> None:
        page.on(
            "console", lambda said: self._complain(said.text) if said.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self._complain(str(error)))
        page.on("dialog", lambda dialog: self._complain(f"a dialog: {dialog.message}"))
        page.on("request", lambda request: self._look(request.url))

    def _look(self, url: str) -> None:
        if urlsplit(url).netloc != self.host:
            self._complain(f"a request elsewhere: {url}")

    def _complain(self, text: str) -> None:
        # What a browser says of every page that is answered 401 or 404.
        if not re.search("the server responded with a status of 40[14]", text):
            self.complaints.append(text)


@pytest.fixture(scope="module")
def shop(state_template: Path) -> Iterator[RunningService]:
    """A service for this module, whose tests count its orders."""
    with copied_folder(state_template) as copy, measured_service(copy) as service:
        yield service


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("this machine has no Chromium (apt-get install chromium)")
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def api(playwright: Playwright, shop: RunningService) -> Iterator[APIRequestContext]:
    """A program beside the browser, once the history was told."""
    context = playwright.request.new_context(base_url=shop.url)
    position = [tell(context, *report) for report in HISTORY][-1]
    tell_body(context, b'{"order_no":"KOM-3","state":"Dikirim"}')
    tell_body(context, BINARY)
    assert context.get(f"/statistics?after_position={position}").ok
    yield context
    context.dispose()


Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, shop: RunningService, api: APIRequestContext) -> Iterator[Open]:
    """Opens a page in a browser of its own; in the end nothing may have been complained of, in any of them."""
    del api
    yield from opening(browser, shop.url)


def opening(browser: Browser, url: str) -> Iterator[Open]:
    watched = Watched(urlsplit(url).netloc)
    contexts = []

    def open_page(path: str, **options: Any) -> Page:
        given = {"locale": "en-GB", "timezone_id": "Asia/Makassar", **options}
        context = browser.new_context(base_url=url, **given)
        context.set_default_timeout(MILLISECONDS_MAX)
        context.add_init_script(
            "addEventListener('securitypolicyviolation', (event) => console.error(event.blockedURI))"
        )
        contexts.append(context)
        page = context.new_page()
        watched.follow(page)
        page.goto(path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert watched.complaints == []


def tell(api: APIRequestContext, order_no: str, cnote: str, status: str) -> int:
    """Send a report, and return its position."""
    answer = api.put("/webhook", data={"order_no": order_no, "cnote": cnote, "status": status})
    position: int = answer.json()["position"]
    return position


def tell_body(api: APIRequestContext, body: bytes) -> None:
    assert api.put("/webhook", data=body).json()["outcome"] == "quarantined"


def search(page: Page, text: str) -> None:
    page.get_by_role("searchbox").fill(text)
    page.get_by_role("button", name="Search").click()


def entries(page: Page) -> list[str]:
    return page.locator(".timeline h3").all_inner_texts()


def test_an_order_is_found_by_its_number_and_by_any_airway_bill(opened: Open) -> None:
    """Where one order has it, its page is shown at once; else a list; and nothing is said to be nothing."""
    page = opened("/")
    for asked in (ORDER, "AWB-1", "AWB-2", f" {ORDER} "):
        search(page, asked)
        expect(page).to_have_url(re.compile(f"/track/{ORDER}$"))
        expect(page.get_by_role("heading", level=1)).to_have_text(ORDER)
    search(page, "AWB-SHARED")
    expect(page.locator(".orders .order-link")).to_have_text(["KOM-22", "KOM-21", "KOM-20"])
    search(page, "kom-1")
    expect(page.get_by_text("No order was found.")).to_be_visible()


def test_a_timeline_is_whole_without_javascript(opened: Open) -> None:
    """Top to bottom: statuses, times in WIB, time spent, marks, reasons, and the raw report one click away."""
    page = opened(f"/track/{ORDER}", java_script_enabled=False)
    assert entries(page) == [
        "Submitted", "In transit", "Picked up", "Antar Ulang", "Cancelled", "Out for delivery",
    ]  # fmt: skip
    expect(page.locator(".timeline .mark")).to_have_text(["Late", "Unrecognised", "Refused"])
    expect(page.locator(".entry.refused .why")).to_have_text(
        "“Cancelled” contradicts “In transit”, which was reported before it. The status stays: In transit"
    )
    expect(page.locator("#v1")).to_contain_text("Repeated 1×, last")  # noqa: RUF001 - as it stands there
    expect(page.locator("#v3")).to_contain_text("Never reported in between: Packed, Picked up")
    expect(page.locator("#v3 .spent")).to_contain_text("in this status")
    expect(page.locator("#v7 .spent")).to_contain_text("so far")
    expect(page.locator("#v7 .entry-time")).to_have_text(re.compile(r"^\d+ \w{3} \d{4}, \d\d:\d\d WIB$"))
    expect(page.locator("#v7")).to_contain_text("AWB-2")
    expect(page.locator(".rail .now")).to_contain_text("Out for delivery")
    page.locator("#v6").get_by_role("link", name="Raw report").click()
    body = f'{{"order_no":"{ORDER}","cnote":"AWB-1","status":"Dibatalkan"}}'
    expect(page.locator("pre.body")).to_have_text(body)
    expect(page.locator(".fields")).to_contain_text("cancelled contradicts in_transit")


def test_an_order_is_seen_as_it_was_known(opened: Open) -> None:
    """By a link of the list, by the slider, by the form without JavaScript; and there is a way back."""
    page = opened(f"/track/{ORDER}")
    page.locator("#v3").get_by_role("link", name="As known then").click()
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
    still = opened(f"/track/{ORDER}", java_script_enabled=False)
    still.get_by_role("slider").press("Home")
    still.get_by_role("button", name="Show", exact=True).click()
    expect(still.locator(".banner.past")).to_contain_text("version 1 of 7")
    still.get_by_role("link", name="Back to now").first.click()
    expect(still.locator(".banner")).to_have_count(0)


@pytest.mark.parametrize("path", [f"/track/{ORDER}?version=99", "/track/KOM-0", f"/track/{ORDER}/reports/99"])
def test_what_there_is_not_is_a_page_too(opened: Open, path: str) -> None:
    """With a way on, for a person; a problem for a program."""
    page = opened(path)
    expect(page.get_by_role("heading", level=1)).to_have_text("Not found")
    expect(page.get_by_role("link", name="To the overview")).to_be_visible()


def test_a_hostile_order_is_shown_as_it_is_and_does_nothing(opened: Open) -> None:
    """HTML stays text, a bidi override turns nothing around it, and every link leads to this very order."""
    page = opened("/track")
    page.locator(".order-link", has_text="onerror").click()
    expect(page.get_by_role("heading", level=1).locator("bdi")).to_have_text(HOSTILE, use_inner_text=False)
    expect(page.locator(".unusual code")).to_contain_text(r"{x}\u{202e} 100%")
    assert page.title().startswith(f"\u2068{HOSTILE}\u2069")
    assert page.locator("main img, main script, main b").count() == 0
    assert page.locator("h1 bdi").evaluate("(one) => getComputedStyle(one).unicodeBidi") == "isolate"
    expect(page.locator(".cnote").first).to_have_text("<b>AWB</b>")
    expect(page.locator("#v2 h3")).to_have_text("<script>alert(1)</script>")
    page.get_by_role("link", name="As known then").click()
    expect(page.locator(".banner.past")).to_be_visible()
    page.get_by_role("link", name="ID", exact=True).click()
    expect(page.locator("#v1 h3")).to_have_text("Dikirim")
    page.goto(f"{HOSTILE_PATH}/reports/2")
    expect(page.locator("#report h1")).to_contain_text("Laporan 2")
    page.get_by_role("link", name="Kembali ke pesanan").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(HOSTILE, use_inner_text=False)


def test_reports_appear_without_a_reload(opened: Open, api: APIRequestContext) -> None:
    """On the page of the order, where it is said aloud and what has the focus keeps it; and on the overview."""
    tell(api, "KOM-4", "AWB-4", "Diajukan")
    order, overview = opened("/track/KOM-4"), opened("/")
    for page in (order, overview):
        expect(page.locator("#live")).to_have_attribute("data-state", "live")
        page.evaluate("window.isTheSame = true")
    focused = order.locator("#v1").get_by_role("link", name="Raw report")
    focused.focus()
    before = int(overview.locator(".tile strong").first.inner_text())
    tell(api, "KOM-4", "AWB-4", "Diantar")
    tell(api, "KOM-5", "", "Diajukan")
    expect(order.locator(".timeline h3")).to_have_text(["Submitted", "Out for delivery"])
    expect(order.locator(".status-now")).to_contain_text("Out for delivery")
    expect(order.locator("#v2")).to_have_class(re.compile("is-new"))
    expect(order.get_by_role("status")).to_have_text("New report: Diantar")
    expect(order.get_by_role("slider")).to_have_js_property("value", "2")
    expect(focused).to_be_focused()
    expect(overview.locator(".tile strong").first).to_have_text(str(before + 1))
    for page in (order, overview):
        assert page.evaluate("window.isTheSame") is True


def test_the_overview_tells_what_is_to_be_looked_at(opened: Open, api: APIRequestContext) -> None:
    """Its numbers are those of the API, its plots say them in words, and its lists lead to the orders."""
    page = opened("/")
    known = api.get("/statistics").json()
    orders = sum(one["orders"] for one in known["statuses"])
    expect(page.locator(".tile strong").first).to_have_text(str(orders))
    expect(page.get_by_role("img", name=re.compile("Orders by status"))).to_contain_text("Delivered 3")
    expect(page.locator("#contradictions")).to_contain_text("“Cancelled” contradicts “In transit”")
    expect(page.locator("#unknown")).to_contain_text("<script>alert(1)</script>")
    expect(page.locator("#quarantine")).to_contain_text("status is missing")
    expect(page.locator("#stuck")).to_contain_text("No order is stuck.")
    expect(page.locator("#projections .ok")).to_have_count(3)
    page.locator("#per-minute summary").click()
    expect(page.locator("#per-minute table")).to_be_visible()
    page.locator("#contradictions .order-link").first.click()
    expect(page.get_by_role("heading", level=1)).to_have_text(ORDER)


def test_lists_are_filtered_and_paged(opened: Open, api: APIRequestContext) -> None:
    """Fifty orders on a page, and a link to the next."""
    for number in range(51):
        tell(api, f"KOM-6{number:02}", "", "Hilang")
    page = opened("/track?status=lost")
    expect(page.locator(".orders li")).to_have_count(50)
    page.get_by_role("link", name="Next page").click()
    expect(page.locator(".order-link")).to_have_text(["KOM-600"])
    page.get_by_role("link", name="Refused", exact=True).click()
    expect(page.locator(".order-link")).to_have_text([ORDER])


def test_the_quarantine_is_shown_whole_and_says_what_to_do(opened: Open, api: APIRequestContext) -> None:
    """A list by state, each body as text where it is one and byte by byte, and the commands for it."""
    page = opened("/")
    page.locator("#quarantine").get_by_role("link", name="Show all").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Quarantine")
    expect(page.locator(".rows li")).to_have_count(2)
    page.get_by_role("link", name="#1", exact=True).click()
    expect(page.locator("pre.body")).to_have_text('{"order_no":"KOM-3","state":"Dikirim"}')
    expect(page.locator("pre.command").first).to_have_text("order-tracking quarantine retry 1")
    page.get_by_text("Byte by byte").click()
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
    """The newest entries first; the earlier ones and the way back are links."""
    for number in range(52):
        tell(api, "KOM-7", "", ("Dikirim", "Diantar")[number % 2])
    page = opened("/track/KOM-7")
    expect(page.locator(".entry")).to_have_count(50)
    expect(page.locator(".entry").last).to_have_attribute("id", "v52")
    page.get_by_role("link", name="Show what came before").click()
    expect(page.locator(".entry")).to_have_count(2)
    page.get_by_role("link", name="Back to the newest").click()
    expect(page.locator(".entry")).to_have_count(50)


def test_the_language_is_the_browsers_until_another_is_chosen(opened: Open) -> None:
    """The choice holds on the next pages; times and numbers are written by it."""
    assert opened("/", locale="de-DE").locator("html").get_attribute("lang") == "id"
    page = opened(f"/track/{ORDER}?version=3")
    expect(page.locator("html")).to_have_attribute("lang", "en")
    page.get_by_role("link", name="ID", exact=True).click()
    expect(page.locator(".banner.past")).to_contain_text("versi 3 dari 7")
    page.get_by_role("link", name="Ringkasan").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Ringkasan")
    expect(page.locator("#zone")).to_have_text("Waktu ditampilkan dalam zona waktu Anda: Asia/Makassar.")


def test_a_raw_report_opens_over_the_page_and_closes_by_the_keyboard(opened: Open) -> None:
    """Where scripts run, it is shown without leaving the timeline."""
    page = opened(f"/track/{ORDER}")
    page.locator("#v6").get_by_role("link", name="Raw report").press("Enter")
    dialog = page.get_by_role("dialog", name=re.compile("Report 6"))
    expect(dialog).to_contain_text('"status":"Dibatalkan"')
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator("#v6").get_by_role("link", name="Raw report")).to_be_focused()


@pytest.mark.parametrize(("locale", "scheme"), [("id-ID", "light"), ("en-GB", "dark")])
def test_every_page_can_be_read_on_a_phone_in_light_and_dark(opened: Open, locale: str, scheme: str) -> None:
    """Nothing is wider than the phone, every text has contrast to its background, and the structure is there.

    It takes about 7 s: the browser shows every page.
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
        assert page.evaluate(NAMELESS) == [], path
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 20, 27)"
    assert dark == (scheme == "dark")


def test_the_keyboard_comes_everywhere(opened: Open) -> None:
    """The first stop skips to the content; every further one can be seen; the next in it is the content's."""
    page = opened(f"/track/{ORDER}")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    page.keyboard.press("Tab")
    focused = page.locator(":focus")
    expect(page.get_by_role("main").locator(":focus")).to_have_count(1)
    assert focused.evaluate("(one) => getComputedStyle(one).outlineWidth") == "3px"
    tree = page.get_by_role("main").aria_snapshot()
    for said in (
        f'heading "{ORDER}" [level=1]',
        'heading "Timeline" [level=2]',
        'heading "Cancelled"',
        "slider",
    ):
        assert said in tree


@pytest.fixture
def locked(service: RunningService, state_dir: Path, playwright: Playwright) -> tuple[str, str]:
    """The address of a service where keys are on, and a key."""
    key = call_command(state_dir, "keys", "create", "people").stdout.split()[-1]
    api = playwright.request.new_context(base_url=service.url)
    # The service looks for new keys once a second.
    until(lambda: api.get("/track").status == 401)
    api.dispose()
    return service.url, key


def test_a_key_is_asked_for_once_where_keys_are_on(
    browser: Browser, playwright: Playwright, locked: tuple[str, str]
) -> None:
    """A form, a cookie that no script can read, then everything, streams included; until it is forgotten."""
    url, key = locked
    opens = opening(browser, url)
    page = next(opens)("/track?status=lost")
    expect(page.get_by_role("heading", level=1)).to_have_text("A key is needed")
    for given in ("otk_wrong", key):
        page.get_by_label("API key").fill(given)
        page.get_by_role("button", name="Enter").click()
        expect(page.get_by_role("alert")).to_have_count(1 if given != key else 0)
    expect(page).to_have_url(f"{url}/track?status=lost")
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["secure"]) == (True, "Strict", False)
    assert page.evaluate("document.cookie") == ""
    page.goto("/")
    expect(page.get_by_text("No report yet")).to_be_visible()
    expect(page.locator("#live")).to_have_attribute("data-state", "live")
    api = playwright.request.new_context(base_url=url)
    tell(api, ORDER, "", "Dikirim")
    api.dispose()
    expect(page.locator(".tile strong").first).to_have_text("1")
    expect(page.get_by_text("No report yet")).to_have_count(0)
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("A key is needed")
    next(opens, None)


def test_a_key_is_taken_from_our_own_form_alone(playwright: Playwright, locked: tuple[str, str]) -> None:
    """Another site's page cannot give one, and nobody is led elsewhere after it."""
    url, key = locked
    api = playwright.request.new_context(base_url=url)
    form: dict[str, str | float | bool] = {"key": key, "next": "//elsewhere.example/"}
    for headers in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://elsewhere.example"},
        {"Origin": "null"},
    ):
        assert api.post("/session", form=form, headers=headers).status == 403
    answer = api.post("/session", form=form, max_redirects=0)
    assert (answer.status, answer.headers["location"]) == (303, "/")
    assert api.post("/session", data=b"\xff").status == 400
    api.dispose()


def test_pages_and_their_files_are_sent_with_care(api: APIRequestContext) -> None:
    """A strict policy; no cache for what is known of orders, one for ever for files by their bytes."""
    for path in (*PAGES, "/track/KOM-0"):
        answer = api.get(path, headers={"Accept": "text/html"})
        assert answer.headers["content-security-policy"] == SECURITY_POLICY
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["server"] == "order-tracking"
    for name, asset in ASSETS.items():
        answer = api.get(f"/static/{name}?v={asset.version}")
        assert "immutable" in answer.headers["cache-control"]
        again = api.get(f"/static/{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status, again.headers["cache-control"]) == (304, "no-cache")
        assert "http" not in answer.text().replace("http://www.w3.org/2000/svg", "")
    assert api.get("/static/pages.py").status == 404
    problem = api.get("/track/KOM-0")
    assert (problem.status, problem.headers["content-type"]) == (404, "application/problem+json")
    assert api.get("/track?page=2").json()["parameter"] == "page"
