"""What the page shows of a scan: the trigger enlarged, size against concentration, the place among clean encoders."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cupel.records import Record
from cupel.report import render_report
from cupel.report.closeup import ZOOM, applied, closeup, window
from cupel.report.paths import envelope, path_chart, paths_of
from cupel.report.standing import Mark, standings_of, strip_chart
from reported import fake_arrays, fake_record

CLEAN = [0.80, 0.82, 0.85, 0.86, 0.81]


def said(
    word: str = "backdoored", score: float = 0.97, clean: list[float] | None = None, **more: Any
) -> dict[str, Any]:
    alarm = None if clean is None else {"rate": 0.0, "n": len(clean)}
    return {"verdict": word, "score": score, "threshold": 0.9, "tested": "stamps", "reason": "", "false_alarm": alarm,
            "clean_scores": clean or [], "details": {"goal": 0.99}, "evidence": [], **more}  # fmt: skip


def scanned(**each: dict[str, Any]) -> Record:
    first = next(iter(each.values()))
    return fake_record(command="scan", metrics={}, verdicts={"scanned": first}, extra={"scans": {"scanned": each}})


def pixels(uri: str) -> np.ndarray[Any, Any]:
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


# the trigger enlarged


def test_the_closeup_is_the_trigger_and_the_first_image_with_it() -> None:
    draw = np.random.default_rng(0)
    mask, pattern = draw.random((16, 16)).astype(np.float32), draw.random((3, 16, 16)).astype(np.float32)
    images = draw.integers(0, 256, size=(2, 16, 16, 3), dtype=np.uint8)
    made = closeup(mask, pattern, {"images/scanned": images})
    assert made is not None
    assert (made["width"], made["height"], made["zoom"], made["part"]) == (8 * 16, 8 * 16, 8, "")
    assert np.array_equal(pixels(made["clean"]), images[0])
    expected = (1 - mask[..., None]) * images[0] + 255 * mask[..., None] * pattern.transpose(1, 2, 0)
    assert np.abs(pixels(made["hit"]) - expected).max() <= 0.51
    assert np.array_equal(pixels(made["trigger"])[..., 3], np.rint(255 * mask))


def test_of_a_large_image_the_part_around_the_trigger_is_enlarged() -> None:
    mask = np.zeros((224, 224), np.float32)
    mask[150:160, 200:210] = 1
    image = np.random.default_rng(0).integers(0, 256, size=(1, 224, 224, 3), dtype=np.uint8)
    made = closeup(mask, np.ones((3, 224, 224), np.float32), {"images/clean": image})
    assert made is not None
    assert (made["width"], made["height"]) == (ZOOM * 64, ZOOM * 64)
    top, left, height, width = window(mask)
    assert mask[top : top + height, left : left + width].sum() == 100
    assert made["part"] == f"64 × 64 px at ({left}, {top})"
    assert made["clean"] is None
    assert pixels(made["whole"]).shape == (128, 128, 3)
    hit = image[0].copy()
    hit[150:160, 200:210] = 255
    assert np.array_equal(pixels(made["hit"]), hit[top : top + 64, left : left + 64])
    assert (pixels(made["hit"]) == 255).all(axis=-1).sum() >= 100


def test_windows_lie_over_most_of_the_mask_and_in_the_middle_where_all_are_alike() -> None:
    assert window(np.zeros((100, 80)), side=20) == (40, 30, 20, 20)
    weight = np.zeros((10, 30))
    weight[4, 3], weight[4, 25:27] = 1, 0.9
    top, left, height, width = window(weight, side=5)
    assert weight[top : top + height, left : left + width].sum() == pytest.approx(1.8)
    assert window(np.ones((8, 8))) == (0, 0, 8, 8)


@pytest.mark.parametrize("shape", [(3,), (2, 16), (1, 8, 8, 3), (0, 16, 16, 3)])
def test_images_of_another_shape_are_left_out(shape: tuple[int, ...]) -> None:
    trigger = np.ones((16, 16)), np.ones((3, 16, 16))
    made = closeup(*trigger, {"images/scanned": np.zeros(shape, np.uint8)})
    assert made is not None
    assert made["hit"] is None
    assert closeup(np.ones((16, 16)), np.ones((3, 8, 8)), {}) is None


def test_values_that_are_no_shares_stay_in_the_range_of_a_pixel() -> None:
    mask, pattern = np.array([[np.nan, 2.0]]), np.full((3, 1, 2), 7.0)
    assert applied(np.uint8([[[9, 9, 9], [9, 9, 9]]]), mask, pattern).tolist() == [[[9] * 3, [255] * 3]]


# size against concentration


def test_the_envelope_is_the_best_of_everything_as_small() -> None:
    path = np.random.default_rng(0).random((200, 2))
    sizes, reaches = envelope(path) or (np.empty(0), np.empty(0))
    assert (np.diff(sizes) > 0).all()
    assert (np.diff(reaches) > 0).all()
    for area in np.linspace(sizes[0], 1, 50):
        best = max(reach for size, reach in path if size <= area)
        assert reaches[sizes <= area][-1] == best


@pytest.mark.parametrize(
    "odd", [np.zeros(3), np.zeros((4, 3)), np.array("x"), np.full((4, 2), np.nan), np.zeros((0, 2))]
)
def test_what_is_no_path_has_no_envelope(odd: np.ndarray[Any, Any]) -> None:
    assert envelope(odd) is None


def test_a_line_per_start_and_the_goal_where_the_scale_has_it() -> None:
    curves = [(np.array([0.01, 0.1]), np.array([0.9, 0.999])), (np.array([0.1, 1.0]), np.array([0.9, 0.99]))]
    chart = str(path_chart(curves, 0.99, "mask area", "Scanned encoder"))
    assert chart.count('class="start"') == 2
    # from 1 % to 100 % and from 0.9 to 0.999: two decades each, so the middle of both axes is 10 % and 0.9968
    assert 'd="M52.0 172.0H190.0V14.0H328"' in chart
    assert 'd="M190.0 172.0H328.0V93.0H328"' in chart
    assert 'class="limit" d="M52 93.0H328"' in chart
    assert "0.99 is reached from size 0.1 on" in chart
    assert "reached by none" in str(path_chart(curves, 0.9999, "mask area", "x"))
    assert 'class="limit"' not in str(path_chart(curves, None, "mask area", "x"))


@pytest.mark.parametrize("point", [(1.0, 1.0), (1e-7, -0.5), (0.5, 0.99)])
def test_a_single_step_can_be_drawn(point: tuple[float, float]) -> None:
    curve = envelope(np.array([point]))
    assert curve is not None
    chart = str(path_chart([curve], 0.99, "mask area", "x"))
    assert "nan" not in chart
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d", " ".join(re.findall(r' d="([^"]*)"', chart)))]
    assert all(0 <= n <= 340 for n in numbers)


def test_scanners_whose_triggers_are_left_out_of_the_verdict_are_drawn_too() -> None:
    walk = np.array([[0.5, 0.9], [0.1, 0.995]], np.float32)
    told = [{"size": 0.1, "converged": True, "source": f"decree/smoke start {i}"} for i in range(2)]
    other = [{"size": 0.1, "converged": True, "source": "decree/linf-smoke start 0"}]
    record = scanned(decree=said(evidence=told), linf=said("clean-by-test", evidence=other, details={"goal": 0.9}))
    arrays = {"inverted/scanned/0/path": walk, "inverted/scanned/1/path": walk, "scans/scanned/linf/0/path": walk}
    found = paths_of(record, arrays)
    assert [(one["scanner"], len(one["charts"])) for one in found] == [("decree/smoke", 1), ("decree/linf-smoke", 1)]
    charts = [str(one["charts"][0]["chart"]) for one in found]
    assert [chart.count('class="start"') for chart in charts] == [2, 1]
    assert ["goal 0.99<" in chart for chart in charts] == [True, False]
    assert "mask area" in charts[0]
    assert "largest change of a pixel" in charts[1]
    assert paths_of(record, {}) == []


def test_encoders_of_one_scanner_have_the_same_axes() -> None:
    found = paths_of(fake_record(), fake_arrays())
    assert [one["scanner"] for one in found] == ["decree/smoke"]
    charts = [str(one["chart"]) for one in found[0]["charts"]]
    assert len(charts) == 3
    names = [re.findall(r'class="t[xy]" x="([^"]*)" y="([^"]*)">([^<]*)<', chart) for chart in charts]
    assert names[0] == names[1] == names[2]
    assert [chart.count('class="start"') for chart in charts] == [3, 3, 3]


# the place among clean encoders


def test_the_strip_places_scores_on_one_axis() -> None:
    chart = str(strip_chart([0.2, 0.4, 0.6], 0.8, [Mark("Scanned encoder", 1.0, "backdoored"), Mark("b", 0.0, "x")]))
    # 0 to 1 on 14 to 326
    assert re.findall(r'class="peer" d="([^"]*)"', chart) == ["M76.4 42v12M138.8 42v12M201.2 42v12"]
    assert re.findall(r'class="limit" d="M([\d.]+) ', chart) == ["263.6"]
    assert re.findall(r'class="mark (\S+)" d="M([\d.]+) ', chart) == [("backdoored", "326.0"), ("x", "14.0")]
    label = "Scores: 3 clean encoders from 0.2 to 0.6; threshold 0.8; Scanned encoder 1, backdoored; b 0, unknown"
    assert f'aria-label="{label}"' in chart


def test_a_strip_per_calibrated_scanner_and_a_line_for_the_others() -> None:
    record = scanned(
        decree=said(clean=CLEAN), pscan=said("clean-by-test", 0.2), linf=said("inconclusive", 0.0),
        colours=said("clean-by-test", 0.5),
    )  # fmt: skip
    text = render_report([(record, {})])
    assert "5 clean encoders of the same recipe (ticks) score 0.8 to 0.86" in text
    assert "There are no clean encoders to compare with for pscan, colours; the threshold is a fixed one." in text
    assert text.count('class="peer"') == 1
    alone = render_report([(scanned(decree=said()), {})])
    assert "There are no clean encoders to compare with for decree;" in alone
    assert 'class="peer"' not in alone


def test_encoders_judged_by_the_same_clean_ones_share_a_strip() -> None:
    each = {name: {"decree": said(score=score, clean=CLEAN)} for name, score in (("purified", 0.84), ("clean", 0.83))}
    record = fake_record(verdicts={name: one["decree"] for name, one in each.items()}, extra={"scans": each})
    found = standings_of(record)
    assert found is not None
    assert len(found["strips"]) == 1
    assert re.findall(r"(\w+ encoder 0\.8\d)<", str(found["strips"][0]["chart"])) == [
        "Clean encoder 0.83", "Purified encoder 0.84"
    ]  # fmt: skip


def test_records_from_before_say_that_they_do_not_hold_the_scores() -> None:
    old = {k: v for k, v in said(clean=CLEAN).items() if k != "clean_scores"}
    text = render_report([(fake_record(verdicts={"clean": old}), {})])
    assert "This record does not hold the scores" in text
    assert "no clean encoders to compare with" not in text


@pytest.mark.parametrize("odd", [3, "x", [None], [float("nan")], {"a": 1}, [0.5] * 500, ["<b>"]])
def test_odd_scores_and_paths_do_not_break_the_page(odd: Any) -> None:
    record = scanned(decree=said(clean_scores=odd, evidence=odd, details=odd, false_alarm=odd))
    assert "<html" in render_report([(record, fake_arrays())])
    assert standings_of(fake_record(verdicts={"clean": {"verdict": "inconclusive"}})) is None


def test_names_are_escaped() -> None:
    name = "<script>alert(1)</script>"
    evidence = [{"size": 0.1, "converged": True, "source": f"{name} start 0"}]
    record = scanned(**{name: said(clean=CLEAN, evidence=evidence)})
    arrays = {"inverted/scanned/0/path": np.array([[0.5, 0.9], [0.1, 0.995]])}
    text = render_report([(record, arrays)])
    assert "<script>alert" not in text
    assert 'class="start"' in text
    assert 'class="peer"' in text
