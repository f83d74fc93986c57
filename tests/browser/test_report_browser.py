"""The page in headless Chromium: nothing is fetched, nothing complains or runs, nothing needs sideways scrolling."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import CHROMIUM, needs_browser
from cupel.report import write_report
from reported import fake_arrays, fake_record

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = needs_browser
HOSTILE = (
    "<script>document.title='run'</script><img src=//evil.example/x onerror=\"document.title='run'\">\u202e"
    + "W" * 5000
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    hostile = fake_record(HOSTILE, notes=[HOSTILE], settings={HOSTILE: HOSTILE}, reason=HOSTILE)
    named = {
        "one": [(fake_record(), fake_arrays())],
        "many": [(fake_record(f"size={i}", i), fake_arrays(i)) for i in range(3)],
        "hostile": [(hostile, fake_arrays()), (fake_record(HOSTILE, status="failed", reason=HOSTILE, metrics={}), {})],
        "bare": [(fake_record(), {})],
    }
    for name, cells in named.items():
        write_report(cells, folder / f"{name}.html", title=name)
    return {name: folder / f"{name}.html" for name in named}


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["one", "many", "hostile", "bare"])
def test_quiet_offline_and_no_wider_than_the_window(
    browser: Any, pages: dict[str, Path], name: str, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(pages[name].as_uri())
    for closed in page.query_selector_all("details:not([open])"):
        closed.evaluate("node => { node.open = true }")
    assert page.title() == name
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    spilled = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(n => !n.closest('.skip, thead') &&"
        " n.getBoundingClientRect().right > innerWidth + 1).map(n => n.outerHTML.slice(0, 80))"
    )
    assert spilled == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("getComputedStyle(document.body).marginTop") == "0px"  # the style sheet passed the policy
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(pages["one"].as_uri())
    weak = page.evaluate(
        """() => {
          const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
            .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
            return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2] };
          const ground = n => { for (; n; n = n.parentElement) { const c = getComputedStyle(n).backgroundColor;
            if (!c.endsWith(', 0)')) return c } return 'rgb(255, 255, 255)' };
          return [...document.querySelectorAll('main *, header *')]
            .filter(n => !n.closest('svg') && [...n.childNodes].some(c => c.nodeType === 3 && c.data.trim()))
            .map(n => { const a = light(getComputedStyle(n).color), b = light(ground(n));
              return [n.outerHTML.slice(0, 60), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)] })
            .filter(([, contrast]) => contrast < 4.5) }"""
    )
    assert weak == []
    page.close()
