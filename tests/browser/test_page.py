"""The page in a real browser (Debian's Chromium, driven by Playwright) on a daemon under load, with the fake engine.

Screenshots of each run are kept in build/screenshots: desk and phone, light and dark.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.daemons import Daemon, hob, running

SHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
SIZES = {"desk": (1280, 900), "phone": (390, 844)}
TIMEOUT_MS = 60_000
LOAD = [("notes", "interactive", 1), ("summaries", "background", 30), ("mail", "standard", 8)]


def chromium() -> str:
    """Where the browser is; without one, a skip for a developer and a failure where CI=true."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        reason = "no Chromium here: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # tests run as root too
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """Under load from three apps until the tests are over, with a context, and with one refusal behind it."""
    stop = threading.Event()

    def ask(app: str, service_class: str, length: int) -> None:
        with contextlib.suppress(Exception), daemon.client() as client:
            while not stop.is_set():
                headers = {"X-Hob-App": app, "X-Hob-Class": service_class}
                client._http.headers.update(headers)
                for _ in client.chat("Tell me of rivers. " * length, stream=True, max_tokens=40):
                    if stop.is_set():
                        return

    with running(model="fake:10") as daemon:
        with daemon.client() as client, daemon.http() as http:
            client.turn(client.create_context("diary", "Be brief.")["id"], "Hello", max_tokens=4)
            assert http.get("/health", headers={"host": "evil.example"}).status_code == 403
        threads = [threading.Thread(target=ask, args=each) for each in LOAD]
        for thread in threads:
            thread.start()
        yield daemon
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT_MS / 1000)


def link(daemon: Daemon) -> str:
    """A fresh one-time link."""
    with daemon.client() as client:
        return f"http://127.0.0.1:{daemon.state.port}{client.dashboard()}"


@contextlib.contextmanager
def visit(
    browser: Browser, daemon: Daemon, size: str = "desk", scheme: str = "light", num_messages: int = 0
) -> Iterator[Page]:
    """A new browser that followed a link. What it writes to its console, a CSP violation too, is counted."""
    width, height = SIZES[size]
    messages: list[str] = []
    with browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme) as context:  # type: ignore[arg-type]
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(link(daemon))
        yield page
        assert len(messages) == num_messages, messages


@pytest.fixture
def page(browser: Browser, daemon: Daemon) -> Iterator[Page]:
    with visit(browser, daemon) as opened:
        yield opened


def number_in(page: Page, selector: str) -> float:
    """The first number an element shows; -1: none yet."""
    found = re.search(r"[\d,]+(\.\d+)?", page.text_content(selector) or "")
    return float(found.group().replace(",", "")) if found else -1.0


def test_every_panel_shows_live_numbers(page: Page) -> None:
    expect(page.locator("#status.live")).to_contain_text("fake")
    for tile in ("#now-output", "#now-ttft", "#now-requests", "#now-memory"):
        page.wait_for_function("s => Number(document.querySelector(s).textContent.replaceAll(',', '')) > 0", arg=tile)
    expect(page.locator("#chart-throughput path.c1").first).to_be_attached()
    expect(page.locator("#chart-ttft path.c3").first).to_be_attached()
    assert page.locator("#memory-parts li").count() >= 3
    assert number_in(page, "#memory-total") > 10
    for app, service_class, _ in LOAD:
        expect(page.locator("#apps tr", has_text=app)).to_have_count(1)
        expect(page.locator("#requests tr", has_text=app).first).to_contain_text(service_class)
    expect(page.locator("#models")).to_contain_text("loaded")
    expect(page.locator("#contexts tr")).to_have_count(1)
    expect(page.locator("#refusals")).to_contain_text("evil.example")


def test_numbers_move(page: Page) -> None:
    row = page.locator("#apps tr", has_text="summaries").locator("td").last
    before = row.text_content()
    expect(row).not_to_have_text(before or "")


def test_playground_chats_and_shows_probabilities(page: Page) -> None:
    page.click("nav a[href='#playground']")
    page.fill("#chat-text", "Name three rivers.")
    page.fill("#chat-tokens", "12")
    page.click("#chat-send")
    expect(page.locator(".took")).to_contain_text("tokens read")
    page.locator(".tok").first.click()
    expect(page.locator("#token-bars .bar").first).to_be_visible()
    assert page.locator("#token-bars .bar").count() >= 5
    assert "%" in (page.text_content("#token-bars .bar .n") or "")


def test_playground_classifies(page: Page) -> None:
    page.goto(page.url.partition("#")[0] + "#playground")
    page.fill("#classify-labels", "travel, food")
    page.click("#classify-send")
    expect(page.locator("#classify-bars .bar")).to_have_count(2)
    shares = [float(text.strip(" %")) for text in page.locator("#classify-bars .n").all_text_contents()]
    assert sum(shares) == pytest.approx(100, abs=1.5)


def test_an_error_is_shown_in_the_services_own_words(browser: Browser, daemon: Daemon) -> None:
    with visit(browser, daemon, num_messages=1) as page:  # Chromium writes a 400 to the console
        page.click("nav a[href='#playground']")
        page.fill("#classify-labels", "alone")
        page.click("#classify-send")
        expect(page.locator("#classify-note")).to_contain_text("Expected 2 to 128")


def test_the_page_asks_nobody_else(page: Page, daemon: Daemon) -> None:
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
    page.reload()
    page.wait_for_selector("#apps tr")
    assert hosts == {f"127.0.0.1:{daemon.state.port}"}


def test_a_link_works_once_and_the_page_needs_one(browser: Browser, daemon: Daemon) -> None:
    used = hob(daemon.home, "dashboard", "--no-open").stdout.strip()
    with browser.new_context() as first, browser.new_context() as second:
        page = first.new_page()
        page.goto(used)
        page.wait_for_selector("#service")
        (cookie,) = first.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        other = second.new_page()
        for address in (used, used.partition("/enter")[0]):
            reply = other.goto(address)
            assert reply is not None
            assert reply.status == 403
            assert "hob dashboard" in (other.text_content("body") or "")


def test_a_foreign_page_gets_nothing(page: Page, daemon: Daemon) -> None:
    """A page of another origin, in a browser that has a session: its request is refused before it does anything."""
    foreign = page.context.new_page()
    foreign.goto("data:text/html,<p>elsewhere</p>")
    address = f"http://127.0.0.1:{daemon.state.port}/hob/v1/overview"
    ask = "async (a) => { try { return (await fetch(a)).status } catch { return 'blocked' } }"
    assert foreign.evaluate(ask, address) == "blocked"
    assert page.evaluate(ask, address) == 200


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_it_fits_and_is_kept_as_a_picture(browser: Browser, daemon: Daemon, size: str, scheme: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    with visit(browser, daemon, size, scheme) as page:
        page.wait_for_selector("#apps tr")
        page.wait_for_selector("#chart-throughput path.c1", state="attached")
        for view in ("service", "playground"):
            page.click(f"nav a[href='#{view}']")
            if view == "playground":
                page.fill("#chat-tokens", "12")
                page.click("#chat-send")
                page.wait_for_selector(".took")
                page.locator(".tok").first.click()
                page.click("#classify-send")
                page.wait_for_selector("#classify-bars .bar")
                page.evaluate("scrollTo(0, 0)")
            page.screenshot(path=SHOTS / f"{view}-{size}-{scheme}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
