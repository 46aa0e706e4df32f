"""The screenshots of the README: the overview and an order's page, with the data of ``make demo``.

``make screenshots`` writes them. Run it again when the pages change. It needs Chromium.
"""

import json
import shutil
import sys
import urllib.request
from typing import Any, Final

from playwright.sync_api import sync_playwright

from tests.support.folders import ROOT, temporary_folder
from tests.support.processes import RunningService, run_command, running_service

FOLDER: Final = ROOT / "docs" / "images"
SIMULATION: Final = ("--orders", "300", "--rate", "0", "--seed", "7")
TROUBLES: Final = (
    *("--duplicates", "0.05", "--reorder", "0.05", "--delay", "0.02", "--hang-up", "0.02"),
    *("--unknown", "0.01"),
)
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
OVERVIEW_SIZE: Final = {"width": 1180, "height": 560}
ORDER_SIZE: Final = {"width": 1180, "height": 640}


def main() -> int:
    """Write the screenshots, and return the exit code."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.stderr.write("Chromium is not installed: install it (Debian, Ubuntu: apt install chromium)\n")
        return 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    with temporary_folder() as folder, running_service(folder) as service:
        run_command(service.state_dir, "simulate", "--url", f"{service.url}/webhook", *SIMULATION, *TROUBLES)
        order_no = _most_contradicted(service)
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            pages = (("overview.png", "/", OVERVIEW_SIZE), ("order.png", f"/track/{order_no}", ORDER_SIZE))
            for name, path, size in pages:
                page = chromium.new_page(viewport=size, color_scheme="light", locale="en-GB")  # type: ignore[arg-type]
                page.goto(f"{service.url}{path}{'&' if '?' in path else '?'}lang=en")
                page.screenshot(path=FOLDER / name)
                sys.stdout.write(f"{FOLDER / name}: {(FOLDER / name).stat().st_size:,} bytes\n")
            chromium.close()
    return 0


def _most_contradicted(service: RunningService) -> str:
    """Return the order whose timeline has the most kinds of verdicts and, among equals, the most entries."""
    with urllib.request.urlopen(f"{service.url}/orders?limit=300") as response:  # noqa: S310 - our own service
        orders: list[dict[str, Any]] = json.load(response)["orders"]

    def variety(order: dict[str, Any]) -> tuple[int, int]:
        return sum(count > 0 for count in order["counts"].values()), order["version"]

    return str(max(orders, key=variety)["order_no"])


if __name__ == "__main__":
    sys.exit(main())
