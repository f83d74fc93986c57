"""Grids on the page: seeds taken together, which chart is drawn for which axes, and where its marks lie."""

from __future__ import annotations

import re

import pytest

from cupel.records import Metric, mean_interval
from cupel.report import render_report, render_table
from cupel.report.charts import Point, Series, dot_chart, heat_map, interval_chart
from cupel.report.grid_view import grid_views
from cupel.report.grids import pooled, rows_of, shown_value
from cupel.report.words import distortion_of, metric_word
from reported import fake_record

HOSTILE = "<script>alert(1)</script>\u202e" + "W" * 3000


def cell(grid, asr=0.9, ba=0.7, *, seed=0, more=(), status="done", reason="", name="exp", place=0):
    shares = {"attack_success_rate": asr, "backdoored_accuracy": ba, "clean_accuracy": 0.75, **dict(more)}
    metrics = {k: Metric.of([(round(1000 * v), 1000)]) for k, v in shares.items()} if status == "done" else {}
    return fake_record(
        f"{name}--{grid}", seed, metrics=metrics, verdicts={}, settings={"name": name}, status=status, reason=reason,
        extra={"grid": {**grid, "seed": seed}, "cell": place, "downstream": [{"task": "shapes", "target_class": 1}]},
    )  # fmt: skip


def test_three_seeds_give_a_t_interval_and_two_span_both():
    cells = [Metric.of([(k, 100)]) for k in (50, 60, 70)]
    three, two = pooled(cells), pooled(cells[:2])
    assert three.value == pytest.approx(0.6)
    assert (three.low, three.high) == pytest.approx(mean_interval([0.5, 0.6, 0.7]))
    assert (three.seeds, three.by_seed) == (3, (0.5, 0.6, 0.7))
    assert (two.value, two.low, two.high) == (pytest.approx(0.55), cells[0].low, cells[1].high)
    assert pooled(cells[:1]) is cells[0]
    nothing = Metric(None, None, None, 0, 1)
    assert pooled([nothing, cells[0]]) is cells[0]
    assert pooled([nothing]).value is None


def test_the_seed_is_no_axis_and_what_does_not_vary_neither():
    records = [cell({"a.b": b, "c": 1}, 0.1 * b, seed=seed) for b in (2, 4) for seed in (0, 1, 2)]
    axes, rows = rows_of(records)
    assert axes == {"a.b": [2, 4]}
    assert [(row.at, row.seeds) for row in rows] == [({"a.b": "2"}, 3), ({"a.b": "4"}, 3)]
    assert rows[1].metrics["attack_success_rate"].value == pytest.approx(0.4)


def test_several_tasks_are_an_axis():
    record = fake_record(
        metrics={f"{t}/attack_success_rate": Metric.of([(k, 10)]) for t, k in (("a", 9), ("b", 4))},
        extra={"downstream": [{"task": "a", "target_class": 1}, {"task": "b", "target_class": 2}]},
    )
    axes, rows = rows_of([record])
    assert axes == {"task": ["a → class 1", "b → class 2"]}
    assert [row.metrics["attack_success_rate"].value for row in rows] == [0.9, 0.4]


def test_numbers_make_a_line_in_their_order():
    records = [cell({"attack.trigger.size": s}, a) for s, a in ((10, 1.0), (2, 0.0), (6, 0.5))]
    (view,) = grid_views(records)
    (chart,) = view["charts"]
    line = re.search(r'<polyline class="series hit" points="([^"]+)"', chart["chart"]).group(1)
    points = [tuple(map(float, one.split(","))) for one in line.split()]
    xs, ys = zip(*points, strict=True)
    assert ys == (178.0, 95.0, 12.0)  # 0, 50 and 100 % of the frame from 178 up to 12
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    assert "side of the trigger" in chart["chart"]
    assert [row["first"] for row in view["table"]["rows"]] == ["10", "2", "6"]


def test_wide_ranges_are_logarithmic():
    series = [Series("hit", [Point(0.5, 0.4, 0.6)] * 3)]
    chart = interval_chart([1, 10, 100], ["1", "10", "100"], series, "x", "y")
    points = re.search(r'points="([^"]+)"', chart).group(1).split()
    xs = [float(one.split(",")[0]) for one in points]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    ends = re.search(r'<path class="ends hit" d="([^"]+)"', chart).group(1)
    low, high = 178 - 0.4 * 166, 178 - 0.6 * 166
    assert f" {low:.1f}V{high:.1f}M" in ends


def test_names_make_dots_and_gaps_stay_gaps():
    chart = dot_chart(["a", "b"], [Series("hit", [Point(1.0, 0.5, 1.0), None])], "label")
    assert chart.count('class="spot hit"') == 1
    assert 'd="M324 25h0"' in chart  # 100 % lies at the right edge of the frame
    assert 'd="M168 25H324"' in chart  # from 50 to 100 %


def test_two_axes_make_a_heat_map_per_metric_that_varies():
    lambdas = (0.1, 1.0, 10.0)
    at = [(a, b) for a in lambdas for b in lambdas]
    records = [cell({"attack.lambda_reference": a, "attack.lambda_utility": b}, 0.5, min(0.7, b)) for a, b in at]
    (view,) = grid_views(records)
    assert [chart["title"] for chart in view["charts"]] == ["BA · Backdoored accuracy"]  # the others are all the same
    chart = view["charts"][0]["chart"]
    assert chart.count("<rect") == 9
    assert re.findall(r'class="within"[^>]*>([\d.]+)<', chart) == ["10.0", "70.0", "70.0"] * 3
    strengths = [float(one) for one in re.findall(r'fill-opacity="([\d.]+)"', chart)]
    assert strengths[0] == pytest.approx(0.06 + 0.5 * 0.1)
    assert strengths[1] == pytest.approx(0.06 + 0.5 * 0.7)


def test_a_missing_square_is_a_dash():
    chart = heat_map(["a"], ["x", "y"], [[0.5, None]], ("r", "c"), "hit", "label")
    assert re.findall(r'class="within"[^>]*>([^<]+)<', chart) == ["50.0", "–"]


def test_skipped_rows_stand_in_the_table_with_their_reason():
    records = [cell({"task": "GTSRB"}), cell({"task": "SVHN"}, status="skipped", reason="svhn: is not here")]
    (view,) = grid_views(records)
    assert view["charts"] == []  # one point is no chart
    assert [row["reasons"] for row in view["table"]["rows"]] == [[], ["skipped: svhn: is not here"]]
    assert "skipped: svhn: is not here" in render_report([(one, {}) for one in records])


def test_cases_stand_in_the_order_of_the_file():
    records = [cell({"case": name}, place=place) for name, place in (("a", 2), ("b", 3), ("z", 1))]
    (view,) = grid_views(records)
    assert [row["first"] for row in view["table"]["rows"]] == ["z", "a", "b"]


def test_distortions_get_a_chart_of_their_own_and_a_column():
    more = {
        "attack_success_rate_jpeg_50": 0.4,
        "attack_success_rate_baseline_jpeg_50": 0.1,
        "backdoored_accuracy_jpeg_50": 0.6,
    }
    records = [cell({"head": name}, more=more) for name in ("frozen", "tuned")]
    (view,) = grid_views(records)
    assert [one["title"] for one in view["charts"]] == ["By head", "ASR under distortions", "BA under distortions"]
    assert [one["short"] for one in view["charts"][1]["legend"]] == ["frozen", "tuned"]
    assert "JPEG, quality 50" in view["charts"][1]["chart"]
    assert "baseline" not in view["charts"][1]["chart"]
    assert "ASR (JPEG, quality 50) %" in render_table(records, "text")
    assert metric_word("attack_success_rate_baseline_shift_2").short == "ASR-B (trigger moved by 2 px)"


@pytest.mark.parametrize("name", ["attack_success_rate_baseline", "attack_success_rate_all", "robust_accuracy", "x"])
def test_what_is_no_distortion(name):
    assert distortion_of(name) is None


def test_a_page_without_a_grid_has_no_such_section():
    assert grid_views([fake_record()]) == []
    assert "What changes with what" not in render_report([(fake_record(), {})])


def test_the_same_page_twice_and_hostile_names_are_harmless():
    records = [cell({HOSTILE: value, "b": i}, 0.1 * i, name=HOSTILE) for i, value in enumerate([HOSTILE, 2, None, [1]])]
    pages = [render_report([(one, {}) for one in records]) for _ in range(2)]
    assert pages[0] == pages[1]
    assert "<script" not in pages[0]
    assert "\u202e" not in pages[0]
    section = pages[0].partition('<section class="over">')[2].partition("</section>")[0]
    assert "W" * 120 not in section
    assert "W" * 30 in section


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, "yes"),
        ({"file": "a/b/truck.npz"}, "file truck"),
        ({"method": "patch", "size": 4}, "patch, size 4"),
        (None, "None"),
        (10.0, "10"),
        ([[[[[[1]]]]]], "…"),
    ],
)
def test_values_in_words(value, words):
    assert shown_value(value) == words
