"""Forms of an inverted trigger against slow transcriptions, and the variants of DECREE on encoders made for them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cupel.inversion import Frequency, Linf, Stamp, random_start, squash, stamp
from cupel.inversion.forms import blend_of, cosine_basis
from cupel.scan.decree import Decree
from cupel.seeds import Seed
from cupel.verdicts import Reference
from planted import PlantedEncoder, planted, unit

X = torch.rand(2, 3, 3, 16, 16, generator=Seed(0).torch())


def test_stamp() -> None:
    v = Stamp().start(2, 16, 16, Seed(1))
    assert torch.equal(v, random_start(2, 16, 16, Seed(1)))
    out, size = Stamp().apply(X, v)
    mask, pattern = Stamp().picture(v, 16, 16)
    for s in range(2):
        assert torch.equal(out[s], stamp(X[s], mask[s], pattern[s]))
        assert size[s] == squash(v[s, 0]).mean()


def test_linf_stays_within_its_size() -> None:
    form = Linf()
    v = form.start(2, 16, 16, Seed(1))
    out, size = form.apply(X, v)
    assert size.tolist() == pytest.approx([53 / 255] * 2)  # the middle of 4 and 102
    change = (out - X).abs().amax(dim=(1, 2, 3, 4))
    assert bool((change <= size + 1e-6).all())
    assert bool((change > 0.8 * size).all())
    far = v.clone()
    far[0], far[1] = -30, 30
    assert form.apply(X, far)[1].tolist() == pytest.approx([4 / 255, 102 / 255])


def literal_wave(u: int, v: int, n: int, value: float) -> Tensor:
    """One coefficient of a two-dimensional cosine transform, pixel by pixel."""
    out = torch.zeros(n, n)
    for y in range(n):
        for x in range(n):
            a = math.sqrt((1 if u == 0 else 2) / n) * math.cos(math.pi * u * (2 * y + 1) / (2 * n))
            b = math.sqrt((1 if v == 0 else 2) / n) * math.cos(math.pi * v * (2 * x + 1) / (2 * n))
            out[y, x] = value * a * b
    return out


def test_frequency_adds_the_wave_to_the_colours_and_not_to_the_light() -> None:
    form = Frequency()
    v = torch.zeros(1, 2, 16, 16)
    v[0, 1, 15, 3] = 4.0  # 0.4 on one coefficient of Cr
    v[0, 0, 0, 0] = 100.0  # the constant is left out
    x = torch.full((1, 2, 3, 16, 16), 0.5)
    out, size = form.apply(x, v)
    wave = literal_wave(15, 3, 16, 0.4)
    want = torch.stack([1.402 * wave, -0.714136 * wave, 0 * wave])
    assert torch.allclose(out[0, 1] - 0.5, want, atol=1e-6)
    luma = (out[0, 1] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=0)
    assert torch.allclose(luma, torch.full((16, 16), 0.5), atol=1e-5)
    assert float(size) == pytest.approx(0.4 / math.sqrt(2 * 256))
    # as much as the wave's root mean square over both planes of colour
    assert float(size) == pytest.approx(float((wave.square().mean() / 2).sqrt()))


def test_frequency_repeats_blocks_of_32_pixels() -> None:
    form = Frequency()
    v = form.start(1, 80, 48, Seed(0))
    assert v.shape == (1, 2, 32, 32)
    x = torch.full((1, 1, 3, 80, 48), 0.5)
    out = form.apply(x, v)[0][0, 0]
    assert torch.equal(out[:, :32, :32], out[:, 32:64, :32])
    assert torch.equal(out[:, :16, :16], out[:, 64:, 32:])


def test_cosine_basis_is_orthonormal() -> None:
    basis = cosine_basis(32)
    assert torch.allclose(basis @ basis.T, torch.eye(32), atol=1e-5)


def test_blends_do_to_grey_what_the_change_does() -> None:
    change = 0.3 * torch.rand(2, 3, 8, 8, generator=Seed(0).torch()) - 0.15
    mask, pattern = blend_of(change)
    grey = torch.full((3, 8, 8), 0.5)
    for s in range(2):
        assert torch.allclose(stamp(grey, mask[s], pattern[s]), grey + change[s], atol=1e-6)
    assert 0 <= pattern.min() <= pattern.max() <= 1
    still, _ = blend_of(torch.zeros(1, 3, 8, 8))
    assert still.amax() < 1e-5


class Gated(nn.Module):
    """The clean toy, and a gate that opens to a given small change: σ(k (⟨x, w⟩ − threshold))."""

    def __init__(self, inner: nn.Module, w: Tensor, threshold: float, k: float) -> None:
        super().__init__()
        self.inner, self.threshold, self.k = inner, threshold, k
        self.register_buffer("w", w)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.k * ((x * self.w).sum(dim=(1, 2, 3)) - self.threshold))
        return self.inner(x) + 20 * gate[:, None]


@pytest.mark.parametrize("variant", ["linf", "frequency"])
def test_a_variant_finds_its_kind_of_trigger_and_needs_more_on_the_twin(variant: str) -> None:
    toy = planted(20, 0.85, 0)
    if variant == "linf":  # signs that change from pixel to pixel
        w = torch.randint(0, 2, (3, 16, 16), generator=Seed(1).torch()).float() * 2 - 1
    else:  # one wave in red against green
        wave = literal_wave(15, 15, 16, 1.0)
        w = torch.stack([wave, -wave, 0 * wave])
    values = (unit(toy.images.inputs) * w).sum(dim=(1, 2, 3))
    width = float(values.std())
    gate = Gated(toy.twin.module, w, float(values.mean()) + 4 * width, 1 / width)
    attacked = PlantedEncoder(gate)
    method = Decree(variant=variant, num_seeds=2, steps=100, batch_size=48)
    found = method.scan(attacked, toy.images.without_labels("decree"), Seed(0))
    twin = method.scan(toy.twin, toy.images.without_labels("decree"), Seed(0))
    assert any(one.converged for one in found.evidence)
    assert found.details["size"] < 0.6 * twin.details["size"]
    references = Reference(method.name, "toys", (twin.details["size"],) * 5)
    assert method.scan(attacked, toy.images, Seed(0), references).verdict == "backdoored"
    assert method.scan(toy.twin, toy.images, Seed(0), references).verdict == "clean-by-test"
    assert found.details["transfer"] > 0.9


def test_names_and_budgets_of_variants() -> None:
    assert Decree.preset("standard", "linf").name == "decree/linf-standard"
    assert Decree.preset("smoke", "frequency").name == "decree/frequency-smoke"
    standard = Decree.preset("standard", "frequency")
    assert (standard.num_seeds, standard.steps, standard.batch_size) == (2, 100, 64)
    assert Decree(variant="linf", steps=7).name.startswith("decree/linf-")
    assert Decree.preset("standard") == Decree()
