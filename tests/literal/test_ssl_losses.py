"""Losses of MoCo, BYOL, SimSiam and Barlow Twins against literal transcriptions, closed forms and a library."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cupel.losses import barlow_twins_loss, byol_loss, queue_nce, simsiam_loss
from cupel.losses.redundancy import cross_correlation

Loss = Callable[[Tensor, Tensor], Tensor]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_queue_nce_in_loops(temperature: float) -> None:
    q, k, queue = (drawn(*shape, seed=i).numpy() for i, shape in enumerate([(5, 6), (5, 6), (9, 6)]))
    queue /= np.linalg.norm(queue, axis=1, keepdims=True)
    total = 0.0
    for i in range(5):
        own = math.exp(cosine(q[i], k[i]) / temperature)
        others = sum(math.exp(cosine(q[i], queue[j]) / temperature) for j in range(9))
        total += -math.log(own / (own + others))
    ours = queue_nce(*(torch.from_numpy(x) for x in (q, k, queue)), temperature)
    assert ours.item() == pytest.approx(total / 5, rel=1e-5)


@pytest.mark.parametrize(("size", "value"), [(4096, 3.353358), (32_768, 5.401727), (65_536, 6.092617)])
def test_queue_nce_where_the_queue_is_orthogonal(size: int, value: float) -> None:
    q = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0]])  # any norm
    queue = torch.tensor([[0.0, 0.0, 1.0]]).expand(size, 3)
    assert value == pytest.approx(-5 + math.log(math.exp(5) + size), abs=1e-6)
    assert queue_nce(q, 7 * q, queue, 0.2).item() == pytest.approx(value, abs=2e-6)


def test_queue_nce_gives_gradients_to_queries_alone() -> None:
    q, k, queue = drawn(4, 3).requires_grad_(), drawn(4, 3, seed=1).requires_grad_(), unit(drawn(8, 3, seed=2))
    queue.requires_grad_()
    queue_nce(q, k, queue).backward()
    assert q.grad is not None
    assert torch.allclose((q.grad * q).sum(dim=1), torch.zeros(4), atol=1e-6)
    assert k.grad is None
    assert queue.grad is None
    with pytest.raises(ValueError, match="temperature"):
        queue_nce(q, k, queue, 0.0)


def test_byol_and_simsiam_in_loops() -> None:
    p1, p2, z1, z2 = (drawn(6, 5, seed=i) for i in range(4))
    rows = [[x.numpy()[i] for x in (p1, p2, z1, z2)] for i in range(6)]
    byol = sum((2 - 2 * cosine(a, d)) + (2 - 2 * cosine(b, c)) for a, b, c, d in rows) / 6
    simsiam = sum(-0.5 * (cosine(a, d) + cosine(b, c)) for a, b, c, d in rows) / 6
    assert byol_loss(p1, p2, z1, z2).item() == pytest.approx(byol, abs=1e-6)
    assert simsiam_loss(p1, p2, z1, z2).item() == pytest.approx(simsiam, abs=1e-6)


def test_byol_and_simsiam_closed_forms() -> None:
    a, b = drawn(8, 4), drawn(8, 4, seed=1)
    assert byol_loss(a, b, b, a).item() == pytest.approx(0, abs=2e-6)
    assert byol_loss(a, b, -b, -a).item() == pytest.approx(8, abs=2e-6)
    assert byol_loss(a, b, b, -a).item() == pytest.approx(4, abs=2e-6)  # one direction alone
    assert simsiam_loss(a, b, b, a).item() == pytest.approx(-1, abs=1e-6)
    assert simsiam_loss(a, b, -b, -a).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("loss", [byol_loss, simsiam_loss])
def test_scale_of_predictions_and_targets_does_not_matter(loss: Callable[..., Tensor]) -> None:
    p1, p2, z1, z2 = (drawn(6, 5, seed=i) for i in range(4))
    scaled = loss(p1 * 1e-3, p2 * 40, z1 * 900, z2 * 0.2)
    assert scaled.item() == pytest.approx(loss(p1, p2, z1, z2).item(), abs=1e-6)


@pytest.mark.parametrize("loss", [byol_loss, simsiam_loss])
def test_stop_gradient(loss: Callable[..., Tensor]) -> None:
    """The loss depends on the targets, and autograd does not see it."""
    p1, p2, z1, z2 = (drawn(3, 4, seed=i, dtype=torch.float64).requires_grad_() for i in range(4))
    loss(p1, p2, z1, z2).backward()
    assert z1.grad is None
    assert z2.grad is None
    direction, step = drawn(3, 4, seed=9, dtype=torch.float64), 1e-6
    with torch.no_grad():
        slope = {
            "z1": (loss(p1, p2, z1 + step * direction, z2) - loss(p1, p2, z1 - step * direction, z2)) / (2 * step),
            "p1": (loss(p1 + step * direction, p2, z1, z2) - loss(p1 - step * direction, p2, z1, z2)) / (2 * step),
        }
    assert abs(slope["z1"].item()) > 1e-3
    assert p1.grad is not None
    assert (p1.grad * direction).sum().item() == pytest.approx(slope["p1"].item(), rel=1e-6)


def test_barlow_in_loops() -> None:
    z1, z2 = drawn(7, 4).numpy().astype(np.float64), drawn(7, 4, seed=1).numpy().astype(np.float64) * 3 + 1
    a, b = ((z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + 1e-5) for z in (z1, z2))
    total = 0.0
    for i in range(4):
        for j in range(4):
            c = sum(a[n, i] * b[n, j] for n in range(7)) / 7
            total += (1 - c) ** 2 if i == j else 0.0051 * c**2
    ours = barlow_twins_loss(torch.from_numpy(z1), torch.from_numpy(z2), 0.0051, 0.1)
    assert ours.item() == pytest.approx(0.1 * total, rel=1e-9)


def test_barlow_closed_forms() -> None:
    z = drawn(20_000, 6)
    assert barlow_twins_loss(z, z).item() < 0.0051 * 30 * 4 / 20_000 * 2  # 30 squared correlations of variance 1/N
    diagonal = barlow_twins_loss(z, -z, redundancy=0.0, scale=0.1).item()
    assert diagonal == pytest.approx(0.1 * 4 * 6, rel=1e-4)
    hadamard = torch.tensor([[1.0, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]])
    small = hadamard * 0.01  # variance 1e-4 against ε = 1e-5
    c = cross_correlation(small, small)
    assert torch.allclose(c, torch.eye(3) * 1e-4 / (1e-4 + 1e-5), atol=1e-6)
    repeated = drawn(4000, 1).expand(4000, 3)  # one dimension three times: C is all ones
    assert barlow_twins_loss(repeated, repeated, 0.5).item() == pytest.approx(0.5 * 6, rel=1e-3)
    with pytest.raises(ValueError, match="two rows"):
        barlow_twins_loss(z[:1], z[:1])


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: queue_nce(a, b, unit(drawn(64, 32, seed=5)), 0.07),
        lambda a, b: byol_loss(a, b, b, a),
        lambda a, b: simsiam_loss(a, b, b, a),
        barlow_twins_loss,
    ],
    ids=["queue_nce", "byol", "simsiam", "barlow"],
)
def test_mixed_precision_ends_at_the_losses(loss: Loss) -> None:
    a, b = drawn(16, 32).bfloat16(), drawn(16, 32, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        made = loss(a, b)
    assert made.dtype == torch.float32
    assert torch.equal(made, loss(a.float(), b.float()))


@pytest.mark.full
def test_equal_lightly() -> None:
    theirs = pytest.importorskip("lightly.loss", exc_type=ImportError)
    p1, p2, z1, z2 = (drawn(16, 8, seed=i) for i in range(4))
    cosine_loss = theirs.NegativeCosineSimilarity()
    expected = (cosine_loss(p1, z2) + cosine_loss(p2, z1)) / 2
    assert simsiam_loss(p1, p2, z1, z2).item() == pytest.approx(expected.item(), abs=1e-6)
    assert byol_loss(p1, p2, z1, z2).item() == pytest.approx(4 + 4 * expected.item(), abs=1e-5)
    barlow = theirs.BarlowTwinsLoss(lambda_param=0.0051)(z1, z2)
    assert barlow_twins_loss(z1, z2, 0.0051).item() == pytest.approx(barlow.item(), rel=1e-5)
    bank = theirs.NTXentLoss(temperature=0.2, memory_bank_size=(32, 8))
    bank(z1, z2)  # fills the bank: it is drawn at the first call
    held = bank.memory_bank.bank.clone()
    expected = bank(p1.requires_grad_(), z2)
    assert queue_nce(p1, z2, held, 0.2).item() == pytest.approx(expected.item(), abs=1e-5)
