"""Neural Cleanse: its index and schedule against numbers, its search on a toy with a known shortcut."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from cupel.errors import CupelError, DataError, LabelsWithheld
from cupel.inversion import squash
from cupel.inversion.classwise import ClassSearch, Cost, invert_classes
from cupel.scan.neural_cleanse import NeuralCleanse, anomaly_index
from cupel.seeds import Seed
from cupel.verdicts import Reference
from fingerprints import data_print, model_print
from hijacked import CLASSES, PIXEL, bars, hijacked

QUICK = NeuralCleanse(steps=80, images_per_step=64, precision="fp32")


@pytest.mark.parametrize(
    ("sizes", "median", "mad", "index"),
    [
        ([60, 62, 64, 66, 68, 70, 15], 64, 5.9304, 8.2625),
        ([10, 50, 52, 54, 56, 58, 60, 62, 64, 66], 57, 7.4130, 6.3402),  # the lower median would give 7.7566
    ],
)
def test_anomaly_index(sizes: list[float], median: float, mad: float, index: float) -> None:
    found = anomaly_index(sizes)
    assert found.worst is not None
    assert (found.median, round(found.mad, 4), round(found.worst, 4)) == (median, mad, index)
    assert found.each[sizes.index(min(sizes))] == pytest.approx(index, abs=1e-4)
    moved = anomaly_index([3.5 * size + 7 for size in sizes])
    assert moved.worst == pytest.approx(found.worst)
    assert sum(one > 2 for one in found.each) == 1, "larger masks are no outliers, however far they lie"


def test_equal_sizes_have_no_index() -> None:
    same, most = anomaly_index([3.0] * 5), anomaly_index([3.0, 3.0, 3.0, 3.0, 1.0])
    assert (same.worst, same.spread) == (0.0, False)
    assert (most.worst, most.spread) == (None, False)
    with pytest.raises(ValueError, match="no sizes"):
        anomaly_index([])


def costs(successes: list[bool]) -> dict[int, float]:
    """λ after each step at which it changed, counted from 1."""
    search, state, seen = ClassSearch(cost=1e-3, patience=5, cost_factor=2.0), Cost.start(1), {}
    for step, one in enumerate(successes, 1):
        before, state = float(state.cost), search.after(state, torch.tensor([one]))
        if float(state.cost) != before:
            seen[step] = float(state.cost)
    return seen


def test_cost_schedule() -> None:
    assert costs([True] * 20) == pytest.approx({5: 1e-3, 9: 2e-3, 14: 4e-3, 19: 8e-3})
    falling = costs([True] * 9 + [False] * 10)
    assert falling == pytest.approx({5: 1e-3, 9: 2e-3, 14: 7.0711e-4, 19: 2.5e-4}, rel=1e-4)
    assert costs([False] * 20) == {}
    assert costs([True] * 4 + [False] + [True] * 4) == {}


def test_stop_needs_a_cost_that_was_raised_and_lowered() -> None:
    search, state = ClassSearch(), Cost.start(1)
    for one in [True] * 9:
        state = search.after(state, torch.tensor([one]))
    assert bool(state.raised)
    assert not bool(state.lowered)
    for one in [False] * 5:
        state = search.after(state, torch.tensor([one]))
    assert bool(state.lowered)


def test_mask_and_pattern_stay_in_range() -> None:
    v = torch.linspace(-20, 20, 101, requires_grad=True)
    m = squash(v)
    assert 0 <= float(m.detach().min()) <= float(m.detach().max()) <= 1
    (slope,) = torch.autograd.grad(m.sum(), v)
    assert bool(slope.isfinite().all())


def test_searches_do_not_meet() -> None:
    """A class searched for beside others ends where it ends alone, and chunks of the pass do not matter."""
    weight = torch.randn(5, 3 * 64, generator=Seed(1).torch())
    images, search = bars(64).inputs, ClassSearch(steps=6, images_per_step=32, batch_size=32)

    def classify(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ weight.T

    together = invert_classes(classify, images, torch.arange(5), search, Seed(3))
    alone = invert_classes(classify, images, torch.arange(1), search, Seed(3))
    assert torch.allclose(together.mask[0], alone.mask[0], atol=1e-5)
    assert together.steps.tolist() == [6] * 5


def test_hijacked_class_is_the_only_outlier() -> None:
    data, encoder = bars(), hijacked()
    model, images = model_print(encoder.module), data_print(data)
    found = QUICK.scan(encoder, data, Seed(0))
    assert found.verdict == "backdoored"
    assert len(found.evidence) == 1
    (one,) = found.evidence
    assert one.source.endswith("class 2")
    assert np.unravel_index(one.mask.argmax(), one.mask.shape) == PIXEL
    assert one.mask.sum() < 2, "about one pixel"
    assert [y for y in range(CLASSES) if found.details[f"index_{y}"] > 2] == [2]
    assert min(range(CLASSES), key=lambda y: found.details[f"size_{y}"]) == 2
    assert found.score == pytest.approx(found.details["index_2"])
    assert (model_print(encoder.module), data_print(data)) == (model, images)
    json.dumps(found.to_json(), allow_nan=False)
    assert found.to_json() == QUICK.scan(encoder, data, Seed(0)).to_json()


def test_clean_twin_passes_with_its_smallest_trigger() -> None:
    found = QUICK.scan(hijacked(0.0), bars(), Seed(0))
    assert found.verdict == "clean-by-test"
    assert found.score < found.threshold
    assert len(found.evidence) == 1
    assert found.evidence[0].size > 0.03


def test_bad_input() -> None:
    data, encoder = bars(), hijacked()
    with pytest.raises(LabelsWithheld):
        QUICK.scan(encoder, data.without_labels("neural_cleanse"), Seed(0))
    with pytest.raises(DataError, match="no label"):
        QUICK.scan(encoder, dataclasses.replace(data, labels_=torch.full_like(data.labels_, -1)), Seed(0))
    few = QUICK.scan(encoder, data.subset(torch.arange(63)).without_labels("neural_cleanse"), Seed(0))
    assert (few.verdict, few.score) == ("inconclusive", 0.0)
    more = bars(420)
    two = QUICK.scan(encoder, more.subset(more.labels < 2), Seed(0))
    assert two.verdict == "inconclusive"
    assert "2 classes" in two.reason
    same = data.with_inputs(torch.full_like(torch.as_tensor(data.inputs), 7), "grey")
    assert "one colour only" in QUICK.scan(encoder, same, Seed(0)).reason
    with pytest.raises(DataError, match="reads none"):
        QUICK.scan(encoder, data, Seed(0), Reference("decree/smoke", "x", (0.5,)))
    with torch.no_grad():
        encoder.module.rows[0] = float("nan")
    with pytest.raises(CupelError, match="NaN"):
        QUICK.scan(encoder, data, Seed(0))


def test_a_class_that_nothing_reaches_is_left_out() -> None:
    short = dataclasses.replace(QUICK, steps=1)
    found = short.scan(hijacked(), bars(), Seed(0))
    assert found.verdict == "inconclusive"
    assert "a trigger was found towards" in found.reason
    assert found.score == 0
