"""Opens the report in a real browser and uses it. Needs a Chromium on the PATH; skips aloud without one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from gossamer.report import build_report

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Return ``open(path, **context) -> page``; any console error or request over the network fails the test."""
    complaints: list[str] = []
    contexts = []

    def open_page(path: Any, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def _background(page: Any) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_theme_follows_the_system_and_the_button(visit, fake_run, tmp_path):
    path = build_report([fake_run()], tmp_path / "r.html")
    light, dark = visit(path, color_scheme="light"), visit(path, color_scheme="dark")
    assert _background(light) != _background(dark)
    light.click(".theme")
    assert _background(light) == _background(dark)
    light.click(".theme")
    assert _background(light) != _background(dark)


def test_columns_sort_both_ways(visit, fake_run, tmp_path):
    page = visit(build_report([fake_run()], tmp_path / "r.html"), viewport={"width": 1280, "height": 900})
    head = page.locator("#r0-table thead th", has_text="Latency").first
    k = head.evaluate("h => h.cellIndex")
    values = f"[...document.querySelectorAll('#r0-table tbody tr')].map(r => Number(r.cells[{k}].dataset.v))"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert page.evaluate(values) == sorted(page.evaluate(values), reverse=True)
    head.locator("button").click()
    assert page.evaluate(values) == sorted(page.evaluate(values))


def test_points_tell_and_lead_to_their_row(visit, fake_run, tmp_path):
    page = visit(build_report([fake_run()], tmp_path / "r.html"), viewport={"width": 1280, "height": 900})
    point = page.locator("#r0-speed svg.wide .point:visible").first
    point.focus()
    assert "ms" in page.locator("#tip").inner_text()
    page.keyboard.press("Enter")
    assert page.locator("tr.chosen").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.click("#r0-speed [data-tab='8']")
    assert page.locator("#r0-speed [data-panel='8']").is_visible()
    assert page.locator("#r0-speed [data-panel='1']").is_hidden()


def test_photographs_change_with_the_block(visit, fake_run, tmp_path):
    page = visit(build_report([fake_run()], tmp_path / "r.html"))
    page.wait_for_selector("#r0-photos canvas:visible")
    pixels = "document.querySelector('#r0-photos canvas').toDataURL()"
    kept = "Number(document.querySelector('#r0-photos .kept').textContent.split(' ')[0])"
    last, few = page.evaluate(pixels), page.evaluate(kept)
    for _ in range(6):
        page.click("#r0-photos [data-step='-1']")
    assert page.locator("#r0-photos output").inner_text() == "1"
    assert page.evaluate(pixels) != last and page.evaluate(kept) > few
    page.check("#r0-photos [data-original]")
    assert page.locator("#r0-photos .kept").first.inner_text() == ""


def test_profile_bars_tell_and_tables_open(visit, fake_run, tmp_path):
    page = visit(build_report([fake_run()], tmp_path / "r.html"), viewport={"width": 1280, "height": 900})
    page.locator("#r0-profile svg.wide .work:visible").first.focus()
    assert "ms" in page.locator("#tip").inner_text()
    table = page.locator("#r0-profile table").first
    assert table.is_hidden()
    page.locator("#r0-profile summary").first.click()
    assert table.is_visible()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows(visit, fake_run, tmp_path, width):
    path = build_report([fake_run("a"), fake_run("b", title="another run with a longer name")], tmp_path / "r.html")
    page = visit(path, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown, hidden = ("svg.narrow", "svg.wide") if width == 390 else ("svg.wide", "svg.narrow")
    assert page.locator(shown).first.is_visible() and page.locator(hidden).first.is_hidden()


def test_a_bare_page_works(visit, fake_run, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "report.json").write_text('{"title": "bare", "summary": {"a": 1}}')
    page = visit(build_report([folder], tmp_path / "r.html"))
    page.click(".theme")
    assert page.locator("h1").inner_text() == "bare"
