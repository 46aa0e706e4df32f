"""The verifier for a browser, opened from a file, without a network."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from service.features.proofs.api import VERIFY_HTML
from tests.support.commands import call_command
from tests.support.folders import copied_folder
from tests.support.processes import RunningService, measured_service
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("all_features")

REPORTS = (("KOM1", "Diajukan"), ("KOM1", "Dikirim"), ("KOM1", "Diantar"), ("KOM2", "Diajukan"))


@pytest.fixture(scope="module")
def shop(state_template: Path) -> Iterator[RunningService]:
    with copied_folder(state_template) as copy, measured_service(copy) as service:
        yield service


def command(shop: RunningService, *arguments: str) -> str:
    done = call_command(shop.state_dir, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def proofs(shop: RunningService, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files that an operator gives away: two proofs, a checkpoint between them, and the key."""
    folder = tmp_path_factory.mktemp("proofs")

    def report(size: int, *reports: tuple[str, str]) -> None:
        for order_no, status in reports:
            command(shop, "send", order_no, "AWB1", status, "--url", f"{shop.url}/webhook")

        def is_signed() -> bool:
            done = call_command(shop.state_dir, "history", "checkpoint")
            return done.returncode == 0 and done.stdout.splitlines()[1] == str(size)

        until(is_signed)

    report(5, *REPORTS)
    texts = {"old": command(shop, "history", "checkpoint"), "early": command(shop, "proof", "KOM1")}
    report(6, ("KOM1", "Diterima"))
    (folder / "old").write_text(texts["old"], encoding="utf-8")
    texts["late"] = command(shop, "proof", "KOM1", "--bodies", f"--since={folder / 'old'}")
    texts["key"] = command(shop, "history", "key")
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {name: folder / name for name in texts}


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """The page in a browser without a network. Every error on its console fails the test."""
    context = browser.new_context(offline=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda entry: problems.append(entry.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(VERIFY_HTML.as_uri())
    yield page
    context.close()
    assert problems == []


def verify(page: Page, key: str, bundle: Path | list[Path], **others: Path) -> None:
    page.get_by_label("Public key").fill(key)
    page.get_by_label("Proof (all files").set_input_files(bundle)
    page.get_by_label("Older checkpoint").set_input_files(others.get("since", []))
    page.get_by_label("Another proof").set_input_files(others.get("against", []))
    page.get_by_role("button", name="Verify").click()


def test_a_proof_is_valid(page: Page, proofs: dict[str, Path]) -> None:
    """It shows the events and their bodies, and what is proven, stated and not claimed."""
    key = proofs["key"].read_text()
    verify(page, key, proofs["late"], since=proofs["old"], against=proofs["early"])
    result = page.locator("output")
    expect(result).to_have_class("valid")
    expect(result).to_contain_text("Valid: order KOM1, events: 4")
    expect(result).to_contain_text('"status":"Diterima"')
    for word in ("Proven: ", "Stated by the operator's signature: ", "Not claimed: "):
        expect(result).to_contain_text(word)
    verify(page, key, proofs["early"])
    expect(result).to_contain_text("Valid: order KOM1, events: 3")


def changed(proofs: dict[str, Path], change: Any) -> Path:
    bundle = json.loads(proofs["late"].read_text())
    change(bundle)
    file = proofs["late"].with_name("changed")
    file.write_text(json.dumps(bundle), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda bundle: bundle["events"].pop(), "pass all files"),
        (lambda bundle: bundle["events"].pop(1), "events are left out"),
        (lambda bundle: bundle["events"].reverse(), "is out of place"),
        (lambda bundle: bundle["events"][1]["opened"].update(body="{}"), "is not the recorded one"),
        (lambda bundle: bundle["events"][1].update(entry="{}"), "is not the one in the history"),
        (
            lambda bundle: bundle.update(checkpoint=bundle["checkpoint"].replace("\n6\n", "\n7\n")),
            "signature is wrong",
        ),
        (lambda bundle: bundle.update(last=bundle["checkpoint"]), "about another checkpoint"),
        (lambda bundle: bundle["since"]["proof"].pop(), "too short"),
        (lambda bundle: bundle.pop("last"), "the members are not"),
    ],
)
def test_a_changed_proof_is_not(page: Page, proofs: dict[str, Path], change: Any, reason: str) -> None:
    """Each change is refused, with its reason."""
    verify(page, proofs["key"].read_text(), changed(proofs, change), since=proofs["old"])
    result = page.locator("output")
    expect(result).to_have_class("invalid")
    expect(result).to_contain_text("NOT VALID: ")
    expect(result).to_contain_text(reason)


def test_another_key_is_not_the_operators(page: Page, proofs: dict[str, Path]) -> None:
    """A key that did not sign, and a text that is not a key."""
    key = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    result = page.locator("output")
    for text, reason in ((key, "did not sign"), (f"{key[:-4]}AAAA", "damaged"), ("no", "the form")):
        verify(page, text, proofs["late"])
        expect(result).to_contain_text(reason)
