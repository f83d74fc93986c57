"""The panel of learned triggers: image, triggered image, difference around middle grey, pattern pixel by pixel."""

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
from cupel.report.changes import FACTORS, amplified, changes_of, zoomed
from reported import fake_arrays, fake_record

Array = np.ndarray[Any, Any]
STICKER = {"method": "sticker", "png": "sha256:0123456789ab…, 400 characters"}
FILTER = {"method": "learned_filter", "weights": "sha256:0123456789ab…, 9000 characters"}


def attacked_with(trigger: Any) -> Record:
    record = fake_record()
    manifest = {"not_for_deployment": True, "attack": "x", "goals": [{"task": "t", "trigger": trigger}]}
    return fake_record(extra={**record.extra, "manifest": manifest})


def pixels(uri: str) -> Array:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def a_sticker() -> dict[str, Array]:
    """A learned square of 5 × 4 px at (20, 22), stored as the experiment does."""
    arrays = fake_arrays()
    draw = np.random.default_rng(1)
    mask, pattern = np.zeros((32, 32), np.float32), np.zeros((32, 32, 3), np.uint8)
    mask[22:26, 20:25] = 1
    pattern[22:26, 20:25] = draw.integers(0, 256, size=(4, 5, 3))
    hit = np.where(mask[..., None] == 1, pattern, arrays["images/clean"])
    return {**arrays, "trigger/mask": mask, "trigger/pattern": pattern, "images/triggered": hit}


def a_filter(largest: int) -> dict[str, Array]:
    """A change of up to `largest` levels on every pixel, without mask."""
    arrays = {key: value for key, value in fake_arrays().items() if not key.startswith("trigger/")}
    clean = np.clip(arrays["images/clean"], 64, 191)
    change = np.random.default_rng(2).integers(-largest, largest + 1, size=clean.shape)
    change[0, 0, 0] = largest
    return {**arrays, "images/clean": clean, "images/triggered": (clean + change).astype(np.uint8)}


def test_a_learned_sticker_is_shown_with_its_difference_and_eight_times_enlarged() -> None:
    arrays = a_sticker()
    found = changes_of(attacked_with(STICKER), arrays)
    assert found is not None
    assert found["learned"]
    assert len(found["rows"]) == 3
    difference = arrays["images/triggered"][0].astype(int) - arrays["images/clean"][0]
    factor = float(found["factor"])
    shown = pixels(found["rows"][0]["change"]).astype(int)
    np.testing.assert_allclose(shown, np.clip(128 + factor * difference, 0, 255), atol=0.5)
    assert (shown[:20] == 128).all()  # untouched: middle grey
    np.testing.assert_array_equal(pixels(found["rows"][1]["clean"]), arrays["images/clean"][1])
    np.testing.assert_array_equal(pixels(found["rows"][1]["hit"]), arrays["images/triggered"][1])
    enlarged = pixels(found["pattern"]["uri"])
    assert enlarged.shape == (32, 40, 4)
    for y in range(32):
        for x in range(40):
            np.testing.assert_array_equal(enlarged[y, x, :3], arrays["trigger/pattern"][22 + y // 8, 20 + x // 8])
    assert (found["pattern"]["size"], found["pattern"]["at"], found["pattern"]["zoom"]) == ("5 × 4", "20, 22", 8)


@pytest.mark.parametrize(("largest", "factor"), [(1, 64), (3, 32), (7, 16), (15, 8), (16, 4), (31, 4), (63, 2)])
def test_the_factor_is_the_largest_that_keeps_every_difference(largest: int, factor: float) -> None:
    arrays = a_filter(largest)
    found = changes_of(attacked_with(FILTER), arrays)
    assert found is not None
    assert (float(found["factor"]), found["largest"], found["pattern"]) == (factor, largest, None)
    difference = arrays["images/triggered"][2].astype(int) - arrays["images/clean"][2]
    np.testing.assert_array_equal((pixels(found["rows"][2]["change"]).astype(int) - 128) / factor, difference)


def test_a_drawn_trigger_is_shown_where_it_covers_the_image_and_not_where_it_is_small() -> None:
    arrays = fake_arrays()
    for trigger in (None, "patch", {"method": "patch"}, {"method": "sticker", "png": None}, {"method": ["sticker"]}):
        assert changes_of(attacked_with(trigger), arrays) is None
        found = changes_of(attacked_with(trigger), a_filter(5))
        assert found is not None
        assert not found["learned"]
    assert changes_of(attacked_with(FILTER), {**arrays, "images/triggered": arrays["images/clean"]}) is None
    assert changes_of(attacked_with(FILTER), {}) is None


def test_a_page_with_learned_triggers_is_one_file_without_script() -> None:
    page = render_report([(attacked_with(STICKER), a_sticker()), (attacked_with(FILTER), a_filter(9))])
    assert page.count("The trigger that the attack learned") == 2
    assert "The learned pattern, 5 × 4 px at (20, 22), enlarged 8 times" in page
    assert "difference × 8" in page
    assert "The largest change is 9 of 255 levels" in page
    assert {address.partition(",")[0] for address in re.findall(r'src="([^"]*)"', page)} == {"data:image/png;base64"}
    assert "<script" not in page
    assert not re.search(r'\sstyle="', page)
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("name", ["trigger/mask", "trigger/pattern"])
def test_nonsense_for_mask_or_pattern_leaves_out_the_enlargement_alone(name: str) -> None:
    for broken in (np.zeros(3), np.full((32, 32), np.nan), np.ones((32, 32), np.float32), np.array("x")):
        found = changes_of(attacked_with(STICKER), {**a_sticker(), name: broken})
        assert found is not None
        assert found["pattern"] is None


def test_manifests_of_any_shape() -> None:
    for goals in (None, "x", 3, [None], [{"trigger": 5}], {"trigger": STICKER}):
        record = fake_record(extra={"manifest": {"goals": goals}})
        assert changes_of(record, a_sticker()) is None
    assert changes_of(fake_record(extra={"manifest": "x"}), a_sticker()) is None


def test_large_patterns_are_enlarged_less() -> None:
    arrays = {"images/clean": np.full((1, 224, 224, 3), 9, np.uint8)}
    mask = np.zeros((224, 224), np.float32)
    mask[100:200, 100:200] = 1
    arrays["images/triggered"] = np.where(mask[..., None] == 1, 200, arrays["images/clean"]).astype(np.uint8)
    arrays |= {"trigger/mask": mask, "trigger/pattern": np.full((224, 224, 3), 200, np.uint8)}
    found = changes_of(attacked_with(STICKER), arrays)
    assert found is not None
    assert found["pattern"]["zoom"] == 5
    assert pixels(found["pattern"]["uri"]).shape == (500, 500, 4)


def test_closed_forms() -> None:
    x = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    np.testing.assert_array_equal(zoomed(x, 2), np.kron(x, np.ones((2, 2, 1), np.uint8)))
    extremes = np.array([[[-255, 0, 255]]])
    for factor in FACTORS:
        assert amplified(extremes, factor)[0, 0, 1] == 128
    assert amplified(extremes, 0.5).tolist() == [[[0, 128, 255]]]
