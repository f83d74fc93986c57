"""The copy that follows, the queue, the heads, and learning rates that stay."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cupel.optimizers import LARS, Recipe
from cupel.pretrain import SimCLR
from cupel.pretrain.heads import mlp
from cupel.pretrain.momentum import KeyQueue, MomentumCopy
from cupel.seeds import Seed
from cupel.train import fit
from toys import blobs


def network() -> nn.Sequential:
    return mlp(5, 7, 3, seed=Seed(1))


def moved(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, one in enumerate(net.parameters()):
            one.add_(torch.randn(one.shape, generator=Seed(i).torch()))
    return net


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [one.detach().clone() for one in net.parameters()]


def test_standing_still_and_copying() -> None:
    net = network()
    still, twin = (MomentumCopy(net, start=m, end=m, total=10) for m in (1.0, 0.0))
    before = weights(still)
    moved(net)
    still.follow(net)
    twin.follow(net)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(still), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights(net), weights(twin), strict=True))


def test_following_by_hand() -> None:
    net, total = network(), 4
    made = MomentumCopy(net, start=0.6, end=0.9, total=total)
    expected = [one.double() for one in weights(net)]
    for k in range(total):
        m = 0.9 - (0.9 - 0.6) * (math.cos(math.pi * k / total) + 1) / 2
        assert 1 - made.rate().item() == pytest.approx(m, abs=1e-7)
        moved(net)
        made.follow(net)
        expected = [m * mine + (1 - m) * new.double() for mine, new in zip(expected, weights(net), strict=True)]
    for mine, literal in zip(weights(made), expected, strict=True):
        torch.testing.assert_close(mine.double(), literal, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("start", "end"), [(0.99, 1.0), (0.99, 0.999), (0.996, 0.996)])
def test_the_schedule_begins_and_ends_where_it_should(start: float, end: float) -> None:
    made = MomentumCopy(network(), start=start, end=end, total=1000)
    rates = []
    for k in (0, 500, 1000):
        made.step.fill_(k)
        rates.append(made.rate().item())
    assert rates == pytest.approx([1 - start, 1 - (start + end) / 2, 1 - end], abs=1e-8)


def test_the_copy_has_statistics_of_its_own_and_no_gradient() -> None:
    net = network()
    made = MomentumCopy(net, start=0.5, end=0.5, total=10)
    x, other = torch.randn(16, 5, generator=Seed(0).torch()), torch.randn(16, 5, generator=Seed(1).torch()) + 3
    net(other).sum().backward()
    out = made(x)
    assert not out.requires_grad
    made.follow(net)
    mine, theirs = made.network[0][1], net[1]
    literal = nn.BatchNorm1d(7, affine=False)
    literal(network()[0](x))
    torch.testing.assert_close(mine.running_mean, literal.running_mean)  # of its own pass, not averaged
    torch.testing.assert_close(mine.running_var, literal.running_var)
    assert not torch.allclose(mine.running_mean, theirs.running_mean, atol=1e-2)
    assert all(one.grad is None and not one.requires_grad for one in made.parameters())


def test_two_networks_are_one_copy() -> None:
    first, second = mlp(4, 3, seed=Seed(0)), mlp(3, 2, seed=Seed(1))
    made, x = MomentumCopy(first, second, start=0.0, end=0.0, total=1), torch.randn(3, 4, generator=Seed(2).torch())
    torch.testing.assert_close(made(x), second(first(x)))
    moved(first)
    moved(second)
    made.follow(first, second)
    torch.testing.assert_close(made(x), second(first(x)))


def test_the_queue_is_a_ring() -> None:
    queue = KeyQueue(12, 5, Seed(0))
    start, given = queue.keys.clone(), [torch.randn(4, 5, generator=Seed(i).torch()) * 9 for i in range(4)]
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(12), atol=1e-5, rtol=0)
    queue.push(given[0])
    assert queue.pointer == 4
    torch.testing.assert_close(queue.keys, torch.cat([F.normalize(given[0]), start[4:]]))
    queue.push(given[1])
    queue.push(given[2])
    assert queue.pointer == 0  # ⌈K / N⌉ steps
    torch.testing.assert_close(queue.keys, F.normalize(torch.cat(given[:3])))
    queue.push(given[3])  # the oldest go first
    torch.testing.assert_close(queue.keys, F.normalize(torch.cat([given[3], given[1], given[2]])))
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(12), atol=1e-5, rtol=0)
    assert torch.equal(KeyQueue(12, 5, Seed(0)).keys, start)
    assert not torch.equal(KeyQueue(12, 5, Seed(1)).keys, start)


def test_heads() -> None:
    state = torch.get_rng_state()
    siamese = mlp(8, 6, 6, 4, seed=Seed(0), last_norm=True)
    assert torch.equal(state, torch.get_rng_state())
    kinds = ["Linear", "BatchNorm1d", "ReLU"]
    assert [type(one).__name__ for one in siamese] == [*kinds, *kinds, "Linear", "BatchNorm1d"]
    assert [one.affine for one in siamese if isinstance(one, nn.BatchNorm1d)] == [True, True, False]
    assert all(one.bias is None for one in siamese if isinstance(one, nn.Linear))
    plain = mlp(8, 6, 4, seed=Seed(0), norm=False)
    assert [type(one).__name__ for one in plain] == ["Linear", "ReLU", "Linear"]
    assert all(one.bias is not None for one in plain if isinstance(one, nn.Linear))
    assert torch.equal(plain[0].weight, mlp(8, 6, 4, seed=Seed(0), norm=False)[0].weight)
    assert not torch.equal(plain[0].weight, mlp(8, 6, 4, seed=Seed(1), norm=False)[0].weight)


class Two:
    """Two weights with gradient 1; SGD moves them by the sum of their learning rates."""

    def __init__(self, steady: bool) -> None:
        self.state = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in ("moving", "steady")})
        if steady:
            self.unscheduled = lambda: [self.state["steady"]]

    def parameters(self) -> list[nn.Parameter]:
        return list(self.state.parameters())

    def loss(self, batch):
        return sum(self.state.values()).sum(), {}

    def after_step(self) -> None:
        pass


@pytest.mark.parametrize("steady", [True, False])
def test_weights_may_keep_the_peak_rate(steady: bool) -> None:
    recipe = Recipe(optimizer="sgd", momentum=0.0, lr=0.1, steps=10, warmup_steps=2, batch_size=8, precision="fp32")
    learner = Two(steady)
    fit(learner, blobs(16), recipe, Seed(0), label="t")
    scheduled = sum(recipe.lr_at(t, 10) for t in range(10))
    assert learner.state["moving"].item() == pytest.approx(-scheduled, rel=1e-5)
    assert learner.state["steady"].item() == pytest.approx(-1.0 if steady else -scheduled, rel=1e-5)


@pytest.mark.parametrize("gradient", [0.5, 200.0])  # the clip holds for the first and not for the second
def test_clipped_lars_by_hand(gradient: float) -> None:
    w, b, zero = (nn.Parameter(one) for one in (torch.tensor([[3.0, 4.0]]), torch.tensor([1.0]), torch.zeros(1, 2)))
    w.grad, b.grad, zero.grad = torch.tensor([[0.0, gradient]]), torch.tensor([0.5]), torch.tensor([[1.0, 2.0]])
    LARS([w, b, zero], lr=0.1, momentum=0.9, weight_decay=0.01, trust=0.02, clip=True).step()
    factor = min(0.02 * 5 / (gradient + 0.01 * 5) / 0.1, 1.0)
    assert (factor == 1.0) == (gradient == 0.5)
    expected = torch.tensor([[3 - 0.1 * factor * 0.03, 4 - 0.1 * factor * (gradient + 0.04)]])
    torch.testing.assert_close(w.detach(), expected)
    torch.testing.assert_close(b.detach(), torch.tensor([0.95]))  # one dimension: plain SGD, no decay
    torch.testing.assert_close(zero.detach(), torch.tensor([[-0.1, -0.2]]))
    made = Recipe(optimizer="lars_clip", lr=0.4, weight_decay=1e-5).make_optimizer([w])
    assert (made.defaults["trust"], made.defaults["clip"], made.defaults["weight_decay"]) == (0.02, True, 1e-5)


def test_simclr_as_nlb_and_ctrl_train_it() -> None:
    nlb, ctrl = SimCLR.preset("nlb_cifar"), SimCLR.preset("ctrl")
    assert (nlb.optimizer, nlb.lr, nlb.weight_decay, nlb.batch_size, nlb.epochs) == ("lars_clip", 0.4, 1e-5, 256, 500)
    assert (nlb.temperature, nlb.projector, nlb.projector_width, nlb.projection) == (0.2, "plain", 2048, 256)
    assert (nlb.augment.brightness, nlb.augment.saturation, nlb.augment.hue) == (0.8, 0.8, 0.2)
    assert (ctrl.optimizer, ctrl.lr, ctrl.weight_decay, ctrl.batch_size, ctrl.epochs) == ("sgd", 0.06, 5e-4, 512, 800)
    assert (ctrl.temperature, ctrl.projector, ctrl.projection, ctrl.separate_views) == (0.5, "plain", 128, False)
