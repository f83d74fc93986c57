"""The charts of a grid in headless Chromium: nothing spills over, and text keeps apart, in a narrow window too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import CHROMIUM, needs_browser
from cupel.records import Metric
from cupel.report import write_report
from reported import fake_record

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shares = [0.03, 0.3, 0.6, 0.9, 0.95, 1.0]
    grids: list[tuple[str, dict[str, Any]]] = []
    grids += [("line", {"attack.trigger.size": size}) for size in (1, 2, 3, 4, 6, 10)]
    grids += [("heat", {"attack.lambda_reference": a, "attack.lambda_utility": b}) for a in (0.1, 1) for b in (1, 10)]
    grids += [("dots", {"the victim's classifier": f"a long name of a case, number {i}"}) for i in range(5)]
    cells = []
    for i, (name, grid) in enumerate(grids):
        values = {"attack_success_rate": shares[i % 6], "backdoored_accuracy": 0.7, "clean_accuracy": 0.72}
        if name == "dots":
            values |= {f"attack_success_rate_{one}": 0.5 for one in ("jpeg_50", "resize_16", "shift_4")}
        metrics = {key: Metric.of([(round(900 * share), 900)]) for key, share in values.items()}
        extra = {"grid": grid, "cell": i}
        cells.append((fake_record(f"{name}-{i}", metrics=metrics, settings={"name": name}, extra=extra), {}))
    path = tmp_path_factory.mktemp("grids") / "grids.html"
    write_report(cells, path, title="grids")
    return path


@pytest.mark.parametrize("width", [1280, 400])
def test_charts_fit_and_their_words_do_not_touch(browser: Any, page_file: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(page_file.as_uri())
    assert said == []
    assert page.evaluate("document.querySelectorAll('.over svg.chart').length") == 4
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    spilled = page.evaluate(
        """[...document.querySelectorAll('.over svg.chart')].flatMap(svg => {
          const frame = svg.getBoundingClientRect();
          return [...svg.querySelectorAll('text')].filter(text => { const b = text.getBoundingClientRect();
            return b.left < frame.left - 1 || b.right > frame.right + 1 || b.bottom > frame.bottom + 1 })
            .map(text => text.textContent) })"""
    )
    assert spilled == []
    touching = page.evaluate(
        """[...document.querySelectorAll('.over svg.chart')].flatMap(svg => {
          const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
          return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) => p.left < q.right - 1 &&
            q.left < p.right - 1 && p.top < q.bottom - 4 && q.top < p.bottom - 4).map(([b]) => a + ' | ' + b)) })"""
    )
    assert touching == []
    smallest = page.evaluate(
        """Math.min(...[...document.querySelectorAll('.over svg.chart')].map(svg =>
          svg.getBoundingClientRect().width / svg.viewBox.baseVal.width * 12))"""
    )
    assert smallest >= 10, "the text of the charts, in pixels"
    page.close()
