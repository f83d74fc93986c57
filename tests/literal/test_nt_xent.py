"""NT-Xent against a literal transcription, closed forms and an independent library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cupel.losses import negative_cosine, nt_xent


def literal_nt_xent(z1: np.ndarray, z2: np.ndarray, temperature: float) -> float:
    """Algorithm 1 of the SimCLR paper in loops: 2k-1 and 2k are the two views of image k."""
    z = [row for pair in zip(z1, z2, strict=True) for row in pair]
    total = len(z)

    def s(i: int, j: int) -> float:
        return float(z[i] @ z[j] / (np.linalg.norm(z[i]) * np.linalg.norm(z[j])))

    def ell(i: int, j: int) -> float:
        below = sum(math.exp(s(i, k) / temperature) for k in range(total) if k != i)
        return -math.log(math.exp(s(i, j) / temperature) / below)

    return sum(ell(2 * k, 2 * k + 1) + ell(2 * k + 1, 2 * k) for k in range(total // 2)) / total


@pytest.mark.parametrize("temperature", [0.1, 0.2, 0.5, 1.0])
def test_equals_the_papers_algorithm(temperature):
    rng = np.random.default_rng(0)
    z1, z2 = rng.normal(size=(7, 5)), rng.normal(size=(7, 5)) * 3
    ours = float(nt_xent(torch.from_numpy(z1), torch.from_numpy(z2), temperature))
    assert ours == pytest.approx(literal_nt_xent(z1, z2, temperature), abs=1e-5)


def test_identical_embeddings_give_log_of_negatives():
    z = torch.ones(8, 4)
    assert float(nt_xent(z, z)) == pytest.approx(math.log(15), abs=1e-5)


@pytest.mark.parametrize(("temperature", "value"), [(0.5, 1.06288), (0.2, 0.09014)])
def test_orthonormal_classes(temperature, value):
    z = torch.eye(8)
    assert float(nt_xent(z, z, temperature)) == pytest.approx(value, abs=1e-5)


def test_invariances():
    g = torch.Generator().manual_seed(1)
    z1, z2 = torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g)
    base = nt_xent(z1, z2, 0.2)
    order = torch.randperm(6, generator=g)
    for other in (nt_xent(z2, z1, 0.2), nt_xent(z1[order], z2[order], 0.2), nt_xent(z1 * 7.5, z2 * 0.1, 0.2)):
        assert torch.allclose(base, other, atol=1e-6)


def test_gradient_is_orthogonal_to_the_row():
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    nt_xent(z, torch.flip(z, [0]).detach() + 0.1, 0.5).backward()
    assert torch.allclose((z.grad * z).sum(dim=1), torch.zeros(6), atol=1e-6)


def test_no_overflow_at_low_temperature():
    z = torch.eye(4)
    assert math.isfinite(float(nt_xent(z.half().float(), z, 0.001)))


@pytest.mark.parametrize(("rows", "temperature"), [(1, 0.5), (2, 0.0), (2, -1.0)])
def test_bad_input(rows, temperature):
    with pytest.raises(ValueError, match=r"two rows|temperature"):
        nt_xent(torch.ones(rows, 3), torch.ones(rows, 3), temperature)


@pytest.mark.full
def test_equals_lightly():
    loss = pytest.importorskip("lightly.loss", exc_type=ImportError).NTXentLoss(temperature=0.3)
    g = torch.Generator().manual_seed(3)
    z1, z2 = torch.randn(16, 8, generator=g), torch.randn(16, 8, generator=g)
    assert float(nt_xent(z1, z2, 0.3)) == pytest.approx(float(loss(z1, z2)), abs=1e-5)


def test_negative_cosine_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert float(negative_cosine(a, torch.tensor([[5.0, 0.0]]))) == pytest.approx(
        -(1 + 0 + math.sqrt(0.5)) / 3, abs=1e-6
    )
