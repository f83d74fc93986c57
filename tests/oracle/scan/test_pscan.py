"""Windowed inversion on the planted toy: it finds the sharp trigger that a whole-image mask misses, and its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cupel.errors import DataError, UsageError
from cupel.inversion import concentration
from cupel.inversion.windows import fill_windows, paste, window_corners
from cupel.scan.pscan import PScan
from cupel.seeds import Seed
from cupel.verdicts import Reference
from fingerprints import model_print
from planted import planted, unit

SMOKE = PScan.preset("smoke")


FINE = PScan(stride=1 / 16, batch_size=4)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_trigger_is_found_near_its_place_and_the_twin_is_clean(seed: int) -> None:
    toy = planted(20, 0.85, seed)
    found = FINE.scan(toy.encoder, toy.images.without_labels("pscan"), Seed(seed))
    assert found.verdict == "backdoored"
    best = found.evidence[0]
    assert best.converged
    # the gate is too narrow for every window's start to reach it, so a neighbour may win
    assert float((best.mask * toy.mask.numpy()).sum()) > 0
    twin = FINE.scan(toy.twin, toy.images.without_labels("pscan"), Seed(seed))
    assert twin.verdict == "clean-by-test"
    assert twin.score < 0.8


@pytest.mark.full
def test_a_gate_without_gradient_is_a_known_miss() -> None:
    # Far from the trigger the gate's gradient vanishes, in a window as well as in a mask. If this fails, rejoice.
    toy = planted(40, 0.9, 0)
    missed = FINE.scan(toy.encoder, toy.images, Seed(0))
    assert missed.verdict == "clean-by-test"
    assert missed.score < 0.8


def test_evidence_and_score_are_what_they_say() -> None:
    toy = planted(20, 0.85, 0)
    said = PScan(batch_size=8, precision="fp32").scan(toy.encoder, toy.images, Seed(0))
    assert (said.details["images"], said.details["images_held_out"], said.details["windows"]) == (192, 64, 49)
    order = torch.randperm(256, generator=Seed(0).child("images").torch())
    held, fit = unit(toy.images.inputs[order[:64]]), unit(toy.images.inputs[order[64:]])
    best = said.evidence[0]
    m, p = torch.from_numpy(best.mask), torch.from_numpy(best.pattern)
    with torch.no_grad():
        conc = concentration(toy.encoder((1 - m) * held + m * p) - toy.encoder(fit).mean(dim=0))
    assert said.score == pytest.approx(float(conc), abs=1e-5)
    assert best.size == 16 / 256
    assert said.details["conc"] >= said.details["conc_1"] >= said.details["conc_2"]


def test_references_decide() -> None:
    toy = planted(20, 0.85, 0)
    clean = Reference(SMOKE.name, "toys", (0.4, 0.42, 0.45, 0.47, 0.5))
    found = SMOKE.scan(toy.encoder, toy.images, Seed(0), clean)
    assert found.verdict == "backdoored"
    assert found.details["z"] < -3
    assert found.score > found.threshold
    like = Reference(SMOKE.name, "toys", (1 - found.score,) * 5)
    assert SMOKE.scan(toy.encoder, toy.images, Seed(0), like).verdict == "clean-by-test"
    with pytest.raises(DataError, match="pscan/smoke"):
        SMOKE.scan(toy.encoder, toy.images, Seed(0), Reference("pscan/standard", "toys", (0.4,) * 5))


def test_same_seed_same_verdict_and_the_model_stays() -> None:
    toy = planted(25, 0.85, 0)
    before = model_print(toy.encoder.module)
    first, again, other = (PScan(steps=3, batch_size=4).scan(toy.encoder, toy.images, Seed(s)) for s in (5, 5, 6))
    assert first.to_json() == again.to_json() != other.to_json()
    assert all(np.array_equal(a.pattern, b.pattern) for a, b in zip(first.evidence, again.evidence, strict=True))
    assert model_print(toy.encoder.module) == before


def test_windows_by_hand() -> None:
    assert len(window_corners(32, 32, 8, 4)) == 49
    assert window_corners(4, 4, 4, 2).tolist() == [[0, 0]]
    corners = window_corners(5, 5, 2, 2)
    assert corners.amax() == 3
    x, content = torch.zeros(2, 3, 5, 5), torch.arange(9.0).view(9, 1, 1, 1).expand(9, 3, 2, 2) + 1
    pasted = paste(x, content, corners)
    assert pasted.shape == (9, 2, 3, 5, 5)
    for i, (top, left) in enumerate(corners.tolist()):
        assert pasted[i, 1, 2, top : top + 2, left : left + 2].eq(i + 1).all()
        assert pasted[i].count_nonzero() == 2 * 3 * 4


def test_filling_follows_the_sign_of_the_gradient_in_each_window() -> None:
    images = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    aim = torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1)  # raise red and blue, lower green

    def reach(x: Tensor) -> Tensor:
        return (x * aim).sum(dim=(2, 3, 4)).mean(dim=1)

    corners = window_corners(4, 4, 2, 2)
    filled = fill_windows(reach, images, corners, 2, [0.5, 0.5, 0.5], 4, Seed(0))
    assert filled[:, [0, 2]].eq(1).all()
    assert filled[:, 1].eq(0).all()
    one = fill_windows(reach, images, corners, 2, [0.01], 4, Seed(0))
    start = torch.stack([torch.rand(3, 2, 2, generator=Seed(0).child("start", i).torch()) for i in range(4)])
    assert torch.allclose(one, (start + 0.01 * aim).clamp(0, 1))


def test_settings() -> None:
    assert [PScan.preset(b).name for b in ("smoke", "standard", "paper")] == [
        "pscan/smoke",
        "pscan/standard",
        "pscan/paper",
    ]
    assert PScan(steps=26).name not in ("pscan/smoke", "pscan/standard")
    with pytest.raises(UsageError, match="did you mean 'paper'"):
        PScan.preset("papr")
