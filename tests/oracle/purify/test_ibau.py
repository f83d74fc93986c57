"""I-BAU: the implicit gradient on a quadratic where it is known, and on a network against dense matrices."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.inference import FrozenProbe
from cupel.protocols import Batch
from cupel.purify.ibau import IBAU, IBAULearner, implicit_gradient
from cupel.purify.labelled import linear_head
from cupel.seeds import Seed
from cupel.types import Dataset
from toys import blobs, small_encoder

DATA = blobs(48)


def test_on_a_quadratic_the_fixed_point_gives_the_exact_implicit_gradient() -> None:
    """L_in = ½ (δ − Aθ)ᵀ H (δ − Aθ) has δ* = Aθ; with L_out = ½ ‖δ − c‖² the gradient through δ* is Aᵀ (δ* − c)."""
    draw = Seed(0).torch()
    A = torch.randn(4, 3, generator=draw, dtype=torch.float64)
    root = torch.randn(4, 4, generator=draw, dtype=torch.float64)
    H = root @ root.T + torch.eye(4)
    rate = float(1 / torch.linalg.eigvalsh(H).max())
    c = torch.randn(4, generator=draw, dtype=torch.float64)
    theta = torch.randn(3, generator=draw, dtype=torch.float64, requires_grad=True)
    delta = (A @ theta).detach().requires_grad_(True)
    exact = A.T @ (delta.detach() - c)
    error = []
    for steps in (5, 200):
        mapped = delta - rate * H @ (delta - A @ theta)
        (made,) = implicit_gradient((delta - c).detach(), mapped, delta, [theta], steps)
        error.append(float((made - exact).norm() / exact.norm()))
    assert error[1] < 0.01
    assert error[1] < error[0]


@dataclass(frozen=True, eq=False)
class _Smooth:
    """A small encoder without kinks: dense second derivatives are affordable."""

    module: nn.Module
    width: int = 5
    input_size: int = 2

    def __call__(self, x: Tensor, /) -> Tensor:
        out: Tensor = self.module(x)
        return out


def _smooth() -> tuple[FrozenProbe, Dataset]:
    draw = Seed(7).torch()
    net, head = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh()).double(), nn.Linear(5, 3).double()
    with torch.no_grad():
        for p in (*net.parameters(), *head.parameters()):
            p.normal_(0, 0.5, generator=draw)
    raw = torch.randint(60, 200, (8, 3, 2, 2), generator=draw, dtype=torch.uint8)
    data = Dataset(raw, torch.arange(8) % 3, torch.arange(8), "smooth", ("a", "b", "c"))
    return FrozenProbe(_Smooth(net), head), data


class _Double(IBAULearner):
    """In float64, as the dense matrices are."""

    def shown(self, batch: Batch) -> Tensor:
        return batch.inputs.double() / 255


def test_a_step_against_dense_matrices() -> None:
    model, data = _smooth()
    settings = IBAU(batch_size=8, stamped=0.5, clamp=False, fixed_point_steps=4, search_l2=0.02, augment=None)
    one = _Double(settings, model, data, Seed(1))
    one.search.delta = torch.randn(3, 2, 2, generator=Seed(2).torch(), dtype=torch.float64) * 0.1
    one.search.done += 1  # no search in this step
    rows = torch.arange(8)
    batch = Batch(data.inputs[rows], rows, Seed(3))
    loss, _ = one.loss(batch)
    made = torch.autograd.grad(loss, one.parameters())

    x, y, weights = one.shown(batch), data.labels, one.parameters()
    chosen = torch.randperm(8, generator=batch.seed.child("stamped").torch())[:4]

    def split(flat: Tensor) -> list[Tensor]:
        parts, at = [], 0
        for w in weights:
            parts.append(flat[at : at + w.numel()].view_as(w))
            at += w.numel()
        return parts

    def logits(theta: Tensor, images: Tensor) -> Tensor:
        W1, b1, W2, b2 = split(theta)
        return (images.flatten(1) @ W1.T + b1).tanh() @ W2.T + b2

    def inner(delta: Tensor, theta: Tensor) -> Tensor:
        return -F.cross_entropy(logits(theta, x + delta.view(3, 2, 2)), y) + 0.02 * delta.square().sum()

    def outer(delta: Tensor, theta: Tensor) -> Tensor:
        images = x.clone()
        images[chosen] = x[chosen] + delta.view(3, 2, 2)
        return F.cross_entropy(logits(theta, images), y)

    delta, theta = one.search.delta.flatten(), torch.cat([w.detach().flatten() for w in weights])
    hess = torch.autograd.functional.hessian
    both = torch.cat([delta, theta])
    n = len(delta)
    second = hess(lambda z: inner(z[:n], z[n:]), both)
    slope_d, slope_t = torch.autograd.functional.jacobian(outer, (delta, theta))
    back = torch.eye(n, dtype=torch.float64) - 0.1 * second[:n, :n]
    v = torch.zeros(n, dtype=torch.float64)
    for _ in range(4):
        v = back.T @ v + slope_d
    expected = slope_t + (-0.1 * second[:n, n:]).T @ v
    assert float(loss.detach()) == pytest.approx(float(outer(delta, theta)), rel=1e-6)
    torch.testing.assert_close(torch.cat([g.flatten() for g in made]), expected, rtol=1e-4, atol=1e-6)
    assert float((expected - slope_t).norm()) > 1e-4  # the implicit part is there


def learner(**more: Any) -> IBAULearner:
    encoder = small_encoder(width=4)
    model = FrozenProbe(encoder, linear_head(encoder, DATA, 5e-4))
    return IBAULearner(IBAU(batch_size=16, augment=None, **more), model, DATA, Seed(0))


def test_the_search_finds_a_worse_perturbation_than_none() -> None:
    one = learner()
    x, y = DATA.inputs.float() / 255, DATA.labels
    found = one.worst(Seed(0))
    with torch.no_grad():
        losses = [
            float(F.cross_entropy(one.classifier(one.bearing(x, d)), y)) for d in (torch.zeros_like(found), found)
        ]
    assert losses[1] > 1.05 * losses[0]
    assert 0 <= float(one.bearing(x, found).min()) <= float(one.bearing(x, found).max()) <= 1
    assert float(learner(clamp=False).bearing(x, torch.full_like(found, 2.0)).max()) > 1


def test_one_search_per_round_and_at_least_one_image_bears_it() -> None:
    one, searches = learner(stamped=0.001, fixed_point_steps=0), []
    made = one.worst
    one.worst = lambda seed: searches.append(seed) or made(seed)
    rows = torch.arange(16)
    for _ in range(7):
        loss, _ = one.loss(Batch(DATA.inputs[rows], rows, Seed(0)))
        one.after_step()
    assert len(searches) == 3  # three steps a round
    assert len(set(searches)) == 3
    plain = F.cross_entropy(one.classifier(DATA.inputs[rows].float() / 255), DATA.labels[rows])
    assert float(loss.detach()) != pytest.approx(float(plain.detach()), rel=1e-6)
