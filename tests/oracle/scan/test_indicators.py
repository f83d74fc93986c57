"""Feature indicators by hand, and on an encoder that a random stamp of one colour opens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from cupel.errors import UsageError
from cupel.inversion import concentration
from cupel.scan.indicators import Indicators, deviation, effective_rank, outlyingness, random_triggers
from cupel.seeds import Seed
from cupel.verdicts import Reference
from planted import PlantedEncoder, planted, unit

METHOD = Indicators(stamps=24, blends=4, precision="fp32")


class Broad(nn.Module):
    """Any image with a saturated block of 9 pixels goes to one place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        flat = nn.functional.avg_pool2d(x, 3, stride=1)
        open_ = ((flat > 0.999) | (flat < 0.001)).all(dim=1).flatten(1).any(dim=1).float()[:, None]
        return (1 - open_) * self.inner(x) + open_ * 20


def test_a_broad_backdoor_is_suspicious_and_the_twin_is_not() -> None:
    toy = planted(20, 0.85, 0)
    broad = PlantedEncoder(Broad(toy.twin.module))
    found = METHOD.scan(broad, toy.images.without_labels("indicators"), Seed(0))
    assert found.verdict == "suspicious"
    assert found.score > 0.99
    assert found.details["spread_ratio"] < 0.1
    clean = METHOD.scan(toy.twin, toy.images.without_labels("indicators"), Seed(0))
    assert clean.verdict == "clean-by-test"
    assert clean.details["spread_ratio"] > 0.5
    assert found.details["z_largest"] > 5 * clean.details["z_largest"]
    references = Reference(METHOD.name, "toys", (0.5, 0.5, 0.55, 0.6, 0.6))
    assert METHOD.scan(broad, toy.images, Seed(0), references).verdict == "backdoored"


def test_the_evidence_bears_out_the_score() -> None:
    toy = planted(20, 0.85, 0)
    said = dataclasses.replace(METHOD, batch_size=256).scan(toy.encoder, toy.images, Seed(0))
    assert said.details["forward_images"] == 64 + 32 + 256 + 28 * 256
    assert said.details["backward_images"] == 0
    m, p = torch.from_numpy(said.evidence[0].mask), torch.from_numpy(said.evidence[0].pattern)
    x = unit(toy.images.inputs)
    with torch.no_grad():
        conc = concentration(toy.encoder((1 - m) * x + m * p) - toy.encoder(x).mean(dim=0))
    assert said.score == pytest.approx(float(conc), abs=1e-4)
    again = dataclasses.replace(METHOD, batch_size=256).scan(toy.encoder, toy.images, Seed(0))
    assert said.to_json() == again.to_json()


def test_random_triggers() -> None:
    masks, patterns = random_triggers(30, 2, 16, (0.125, 0.25), 0.3, Seed(0))
    assert masks.shape == (32, 16, 16)
    assert 0 <= patterns.min() <= patterns.max() <= 1
    for mask in masks[:30]:
        rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        assert 2 <= rows == columns <= 4
        assert mask.sum() == rows * columns
    assert masks[30:].eq(0.3).all()
    more, _ = random_triggers(31, 2, 16, (0.125, 0.25), 0.3, Seed(0))
    assert torch.equal(more[:30], masks[:30])


def test_numbers_by_hand() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(4)
    assert effective_rank(torch.tensor([[1.0, 2.0], [2.0, 4.0]])) == pytest.approx(1)
    assert effective_rank(torch.ones(3, 2)) == 0
    clean = torch.tensor([[0.0, 2.0], [0.0, -2.0]])
    assert deviation(clean) == pytest.approx(2)
    assert outlyingness(torch.tensor([[6.0, 1.0], [6.0, -1.0]]), clean) == pytest.approx(3)
    assert outlyingness(torch.ones(2, 2), torch.ones(2, 2)) == 0


def test_settings() -> None:
    names = [Indicators.preset(b).name for b in ("smoke", "standard", "paper")]
    assert names == ["indicators/smoke", "indicators/standard", "indicators/paper"]
    with pytest.raises(UsageError, match="did you mean 'smoke'"):
        Indicators.preset("smok")
