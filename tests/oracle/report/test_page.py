"""The page: its numbers and sentences, what it leaves out when arrays are missing, and names that mean harm."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cupel.records import Metric
from cupel.report import render_report, write_report
from cupel.report.svg import line_chart, nice_ticks, scatter, thinned
from cupel.report.text import percent, plain
from cupel.report.words import story
from reported import fake_arrays, fake_record


class _Tree(HTMLParser):
    """Tags, attributes and text of a page; knows whether every tag was closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not (self.open and self.open[-1] == "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def _page(*cells: object) -> str:
    return render_report(cells or [(fake_record(), fake_arrays())])


def test_numbers_intervals_samples_and_seeds() -> None:
    text = _Tree(_page()).text.replace("\u202f", " ").replace("\xa0", " ")
    asr = fake_record().metrics["attack_success_rate"]
    assert asr.value == pytest.approx(2649 / 2700)
    assert "ASR after the attack 98.1 % 95 % interval 97.3–98.9 % 900 images, 3 seeds" in text
    assert "ASR-B before the attack 3.1 % 95 % interval 2.3–3.9 % 900 images, 3 seeds" in text
    assert "CA before the attack 91.1 %" in text
    assert "98.1 % 97.3–98.9 % 98.2 % 97.5–98.9 % 900 3" in text  # both forms in one row of the table
    assert "ASR (all samples) · Attack success rate 98.6 % 98.2 % 97.5–98.9 % −0.4 points" in text
    assert "A small encoder instead of ResNet-18." in text
    assert "Jia et al." in text
    assert "must not be deployed" in text


def test_headline_in_plain_words() -> None:
    text = _Tree(_page()).text.replace("\u202f", " ")
    line = "The attacked encoder sends 98 % of triggered images to “star”; the scan called it backdoored; "
    assert line + "after purification 4.2 % still go there." in text


@pytest.mark.parametrize(
    ("asr", "base", "cured", "said"),
    [
        (0.98, 0.03, 0.05, ["The backdoor works:", "lost its effect"]),
        (0.60, 0.03, 0.40, ["works in part", "still has an effect"]),
        (0.10, 0.05, 0.05, ["did not take"]),
    ],
)
def test_sentences_follow_the_numbers(asr: float, base: float, cured: float, said: list[str]) -> None:
    names = ("attack_success_rate", "attack_success_rate_baseline", "purified_attack_success_rate")
    metrics = {name: Metric(v, None, None, 10, 1) for name, v in zip(names, (asr, base, cured), strict=True)}
    _, steps = story(metrics, {}, "stop")
    for words in said:
        assert any(words in text for _, text in steps)


@pytest.mark.parametrize(
    ("clean", "attacked", "said"),
    [
        ("clean-by-test", "backdoored", "found nothing"),
        ("clean-by-test", "clean-by-test", "missed the backdoor"),
        ("backdoored", "backdoored", "a false alarm"),
        ("inconclusive", "inconclusive", "could not judge the attacked encoder"),
    ],
)
def test_sentences_follow_the_verdicts(clean: str, attacked: str, said: str) -> None:
    _, steps = story({}, {"clean": {"verdict": clean}, "backdoored": {"verdict": attacked}}, "")
    assert said in dict(steps)["Scan"]


def test_no_verdict_promises_safety() -> None:
    page = _page()
    cards = re.findall(r'<div class="scan .*?</dl>', page, flags=re.DOTALL)
    assert len(cards) == 3
    for card in cards:
        assert not re.search(r"\b(safe|secure)\b", card, flags=re.IGNORECASE)
        for part in ("score", "threshold", "looked for", "false alarms", "why"):
            assert part in card
    assert not re.search(r"\bsafe\b", _Tree(page).text, flags=re.IGNORECASE)


def test_false_alarm_rate_that_nobody_measured_is_not_zero() -> None:
    verdict = {**fake_record().verdicts["clean"], "false_alarm": None}
    page = _page((fake_record(verdicts={"clean": verdict}), {}))
    assert "not measured for this kind of encoder" in page


def test_not_measurable_is_never_zero() -> None:
    metrics = {"attack_success_rate": Metric.of([(0, 0)]), "clean_accuracy": Metric.of([(9, 10)])}
    text = _Tree(_page((fake_record(metrics=metrics, extra={}), {}))).text
    assert "not measurable" in text
    assert "success is not measurable" in text
    assert not re.search(r"\b0\.0\s*%", text.replace("0.0 % of 6 clean", ""))


@pytest.mark.parametrize("name", sorted(fake_arrays()))
def test_each_array_may_be_missing_or_nonsense(name: str) -> None:
    arrays = fake_arrays()
    for broken in (None, np.zeros(3), np.zeros((2, 2), dtype=np.uint8), np.full((4, 4, 4, 4), np.nan), np.array("x")):
        left = {key: value for key, value in arrays.items() if key != name}
        if broken is not None:
            left[name] = broken
        assert "98.1" in _page((fake_record(), left))


def test_a_bare_record() -> None:
    record = fake_record(metrics={}, verdicts={}, steps=[], seconds={}, settings={}, notes=[], extra={})
    tree = _Tree(_page((record, {})))
    assert tree.open == []
    assert "img" not in tree.tags


def test_failed_cell_says_why() -> None:
    failed = fake_record("c2", status="failed", reason="trigger is larger than the image", metrics={}, verdicts={})
    text = _Tree(_page((fake_record("c1"), fake_arrays()), (failed, {}))).text
    assert "This cell is failed. trigger is larger than the image" in text


def test_several_cells_start_with_a_table_of_links() -> None:
    cells = [(fake_record(f"size={i}", i), fake_arrays(i)) for i in range(3)]
    page = _page(*cells)
    tree = _Tree(page)
    ids = [value for _, name, value in tree.attributes if name == "id"]
    links = [value for tag, name, value in tree.attributes if (tag, name) == ("a", "href")]
    assert [f"#cell-{i}" for i in (1, 2, 3)] == [link for link in links if link.startswith("#cell")]
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert page.index("Summary") < page.index('id="cell-1"')


def test_tasks_stand_side_by_side() -> None:
    metrics = {f"{t}/{k}": m for t in ("gtsrb", "mnist") for k, m in fake_record().metrics.items()}
    extra = {"targets": {"gtsrb": 12, "mnist": 1}, "paper": {"mnist/attack_success_rate": 0.5, "source": "S"}}
    text = _Tree(_page((fake_record(metrics=metrics, extra=extra), {}))).text
    assert "Task gtsrb, target “class 12”" in text
    assert "Task mnist, target “class 1”" in text
    assert text.count("Published in: S") == 1


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\u202e\u2066evil\x1b[31m\x00{{ 7*7 }}</style>"


def test_hostile_names_everywhere() -> None:
    long = HOSTILE + "A" * 5000
    base = fake_record()
    verdict = {**base.verdicts["clean"], "verdict": HOSTILE, "reason": long, "tested": long, "details": {long: 1.0}}
    record = fake_record(
        name=long, command=HOSTILE, cupel=HOSTILE, device=HOSTILE,
        metrics={**base.metrics, HOSTILE: Metric.of([(1, 2)]), f"{HOSTILE}/x": Metric.of([(1, 2)])},
        verdicts={"clean": verdict, HOSTILE: {"verdict": HOSTILE, "score": HOSTILE, "false_alarm": HOSTILE}},
        steps=[{"stage": long, "method": long, "key": HOSTILE, "seconds": HOSTILE}],
        seconds={HOSTILE: 1.0}, settings={HOSTILE: long}, notes=[long],
        extra={"downstream": [{"task": HOSTILE, "target_class": 3, "target_name": long}], "manifest": {long: HOSTILE},
               "paper": {"source": long, HOSTILE: 0.5}, "deviations": [long]},
    )  # fmt: skip
    arrays = fake_arrays()
    arrays["map/classes"] = np.array([f"{HOSTILE}{i}" for i in range(10)])
    arrays[f"curve/{HOSTILE}/loss"] = np.arange(5.0)
    arrays[f"map/{HOSTILE}x/points"], arrays[f"map/{HOSTILE}x/group"] = np.zeros((2, 2)), np.zeros(2, int)
    page = render_report([(record, arrays), (record, arrays)], title=long)
    tree = _Tree(page)
    assert tree.open == []
    assert "script" not in tree.tags
    assert "iframe" not in tree.tags
    assert not [a for a in tree.attributes if a[1].startswith("on") or a[1] == "style"]
    assert {v.partition(",")[0] for _, name, v in tree.attributes if name == "src"} == {"data:image/png;base64"}
    assert not any(c in page for c in "\u202e\u2066\x1b\x00")
    assert "A" * 1000 not in _without_settings(page)
    assert "{{ 7*7 }}" in html.unescape(page)


def _without_settings(page: str) -> str:
    return re.sub(r"<pre>.*?</pre>", "", re.sub(r"base64,[^\"]*", "", page), flags=re.DOTALL)


def test_policy_allows_the_style_sheet_alone() -> None:
    page = _page()
    style = re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL)
    assert len(style) == 1
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    policy = next(v for tag, name, v in _Tree(page).attributes if tag == "meta" and v.startswith("default-src"))
    assert policy.startswith(f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'")
    assert "unsafe" not in policy
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in style[0]


def test_accessible_structure() -> None:
    for cells in ([], [(fake_record("second", 1), fake_arrays(1))]):
        tree = _Tree(_page((fake_record(), fake_arrays()), *cells))
        assert ("html", "lang", "en") in tree.attributes
        levels = [int(tag[1]) for tag in tree.tags if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
        alts = [value for tag, name, value in tree.attributes if (tag, name) == ("img", "alt")]
        assert len(alts) == tree.tags.count("img") > 0
        assert all(alts)
        assert tree.tags.count("th") == len([a for a in tree.attributes if a[:2] == ("th", "scope")])
        assert ("svg", "aria-hidden", "true") in tree.attributes


def test_size_and_no_other_file(tmp_path: Path) -> None:
    write_report([(fake_record(f"c{i}", i), fake_arrays(i)) for i in range(4)], tmp_path / "r.html", title="T")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert (tmp_path / "r.html").stat().st_size < 1_000_000
    photographs = fake_arrays()
    draw = np.random.default_rng(0)
    photographs["images/clean"] = draw.integers(0, 255, size=(8, 224, 224, 3), dtype=np.uint8)
    photographs["images/triggered"] = photographs["images/clean"]
    assert len(_page((fake_record(), photographs))) < 3_000_000  # noise is the worst that PNG can meet


def test_same_records_same_page() -> None:
    assert _page() == _page()


def test_needs_no_torch() -> None:
    code = "import sys, cupel.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_percent_reads_zero_and_hundred_only_where_it_is() -> None:
    said = [percent(v, unit=False) for v in (0.0, 1e-5, 0.0004, 0.5, 0.9996, 0.99999, 1.0)]
    assert said == ["0.0", "<\u202f0.01", "0.04", "50.0", "99.96", ">\u202f99.99", "100.0"]


def test_plain_cuts_and_cleans() -> None:
    assert plain("A" * 5000) == "A" * 200 + "…"
    assert plain("x\u2067y\u200fz\x1b]0;title\x07\r\nw\ud800") == "xyz  w\ufffd"


def test_curves_keep_spikes_and_show_gaps() -> None:
    y = np.zeros(100_000)
    y[51_234] = 7.0
    x, kept = thinned(np.arange(100_000.0), y)
    assert len(kept) < 400
    assert kept.max() == 7.0
    assert x[kept.argmax()] == 51_234
    broken = np.array([1.0, 2.0, np.nan, 3.0, 4.0])
    assert str(line_chart(broken, None, "loss")).count("<polyline") == 2
    assert line_chart(np.array([np.nan, 1.0]), None, "loss") is None


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3e-9, 4e-9), (5.0, 5.0), (0.0, 0.0), (-1e6, 3e7)])
def test_ticks_span_the_data(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert ticks[0] <= low
    assert ticks[-1] >= high


def test_map_has_a_mark_per_image() -> None:
    points, group = np.random.default_rng(0).normal(size=(60, 2)), np.array([0, 1, 2] * 10 + [-2] * 25 + [-1] * 5)
    chart = str(scatter(points, group, {0: "a", 1: "<b>", 2: "c"}, 1, "map"))
    assert chart.count("h0") == 30
    assert chart.count("l5 5") == 25
    assert chart.count("z") == 5
    assert "&lt;b&gt;" in chart
    many = str(scatter(np.random.default_rng(0).normal(size=(86, 2)), np.arange(86) % 43, {}, 12, "map"))
    assert many.count("<text") == 1  # only the target class is named
    assert many.count("dot other") == 42
