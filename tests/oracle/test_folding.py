"""Folded encoders against the networks they come from: values, gradients, weight decay, whole attack steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cupel.encoders import Fast, ImageEncoder, ResNet18, ResNet50
from cupel.encoders.image import Card
from cupel.folding import FoldedConv, folded, inference_copy
from cupel.implanting import Aim, ImplantLearner, freeze_norms
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.triggers import Patch
from cupel.types import Goal
from toys import blobs

NARROW = {
    "fast": Fast(width=4, input_size=16),
    "resnet18": ResNet18(width_multiplier=0.0625, input_size=16),
    "imagenet": ResNet18(stem="imagenet", input_size=32),
    "resnet50": ResNet50(input_size=32),
}


def worn(encoder: ImageEncoder, seed: int = 0) -> ImageEncoder:
    """As after training: statistics and affine parts that differ from channel to channel."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in encoder.module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.copy_(torch.randn(part.num_features, generator=g) * 0.3)
                part.running_var.copy_(torch.rand(part.num_features, generator=g) + 0.5)
                part.weight.copy_(torch.rand(part.num_features, generator=g) + 0.5)
                part.bias.copy_(torch.randn(part.num_features, generator=g) * 0.2)
    return encoder


def pictures(n: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(n, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NARROW)
def test_every_batch_norm_is_folded_and_values_agree(name):
    encoder = worn(NARROW[name].build(Seed(0)))
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in encoder.module.modules())
    other = folded(encoder)
    assert sum(isinstance(part, FoldedConv) for part in other.module.modules()) == norms
    x = pictures(3, encoder.input_size)
    with torch.no_grad():
        exact = encoder(x)
        near = {"rtol": 1e-4, "atol": 1e-5 * float(exact.abs().max())}
        torch.testing.assert_close(other(x), exact, **near)
        torch.testing.assert_close(inference_copy(encoder)(x), exact, **near)


@pytest.mark.parametrize("affine", [False, True], ids=["frozen", "affine-trained"])
def test_gradients_are_those_of_the_unfolded_network(affine):
    encoder = worn(NARROW["fast"].build(Seed(0)))
    plain = ImageEncoder(copy.deepcopy(encoder.module).double().eval(), encoder.card)
    ours = ImageEncoder(copy.deepcopy(encoder.module).double().eval(), encoder.card)
    for one in (plain, ours):
        if not affine:
            freeze_norms(one.module)
    x = pictures(4, 16, torch.float64).requires_grad_()
    y = x.detach().clone().requires_grad_()
    weight = torch.randn(4, encoder.width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (plain(x) * weight).sum().backward()
    (folded(ours)(y) * weight).sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-9, atol=1e-12)
    for (name, a), b in zip(plain.module.named_parameters(), ours.module.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or float(a.grad.abs().sum()) > 0, name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-8, atol=1e-11)


def attacked(encoder: ImageEncoder, fold: bool, steps: int = 4) -> dict[str, torch.Tensor]:
    """A few steps of BadEncoder's loss in float64 with momentum and weight decay."""
    data = blobs(32)
    copied = ImageEncoder(copy.deepcopy(encoder.module).double(), encoder.card)
    clean = F.normalize(torch.randn(32, encoder.width, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    goal = Goal(Patch(size=4), data.inputs[:1], "t", 1)
    aim = Aim(goal, data.inputs[:1].double() / 255, clean[:1])
    learner = ImplantLearner(copied, clean, data.ids, [aim])
    if not fold:
        learner.network = copied
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for step in range(steps):
        rows = torch.arange(8) + 8 * (step % 4)
        loss, _ = learner.loss(Batch(data.inputs[rows], rows, Seed(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return copied.module.state_dict()


def test_an_attack_on_the_folded_encoder_ends_with_the_weights_of_the_unfolded_one():
    encoder = worn(NARROW["resnet18"].build(Seed(0)))
    before, plain, ours = encoder.module.state_dict(), attacked(encoder, False), attacked(encoder, True)
    moved = 0.0
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-8, atol=1e-10)
        moved = max(moved, float((value - before[name]).abs().max()))
    assert moved > 1e-3


def test_training_through_either_trains_both():
    encoder = worn(NARROW["fast"].build(Seed(0)))
    freeze_norms(encoder.module)
    other = folded(encoder)
    assert {id(p) for p in other.module.parameters()} == {id(p) for p in encoder.module.parameters()}
    with torch.no_grad():
        encoder.module.backbone.conv1.weight.mul_(1.5)
        x = pictures(2, 16)
        torch.testing.assert_close(other(x), encoder(x), rtol=1e-4, atol=1e-4)


def test_statistics_never_move_even_in_train_mode():
    encoder = worn(NARROW["fast"].build(Seed(0)))
    before = {k: v.clone() for k, v in encoder.module.named_buffers()}
    encoder.module.train()
    folded(encoder)(pictures(4, 16)).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in encoder.module.named_buffers())


def test_inference_copy_is_independent_frozen_and_without_norms():
    encoder = worn(NARROW["fast"].build(Seed(0)))
    before = {k: v.clone() for k, v in encoder.module.state_dict().items()}
    quick = inference_copy(encoder, torch.bfloat16)
    assert not any(isinstance(part, nn.BatchNorm2d | FoldedConv) for part in quick.module.modules())
    assert not any(p.requires_grad for p in quick.module.parameters())
    assert {p.dtype for p in quick.module.parameters()} == {torch.bfloat16}
    x = pictures(5, 16).requires_grad_()
    out = quick(x)
    assert float(torch.cosine_similarity(out.float(), encoder(x)).detach().min()) > 0.9999
    (gradient,) = torch.autograd.grad(out.float().sum(), x)
    assert float(gradient.abs().sum()) > 0
    assert all(p.requires_grad for p in encoder.module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in encoder.module.state_dict().items())


class Odd(nn.Module):
    """One BatchNorm after a convolution whose output is used twice, one with no statistics, one that fits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.b, self.norm_b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.c, self.norm_c = nn.Conv2d(4, 5, 1, groups=1), nn.BatchNorm2d(5, affine=False)

    def forward(self, x):
        x = self.a(x)
        x = x + self.norm_a(x)
        x = self.norm_b(self.b(x)).relu()
        return self.norm_c(self.c(x)).mean((2, 3))


def test_what_cannot_be_folded_stays():
    module = Odd().eval()
    module.norm_c.running_mean.fill_(0.7)
    module.norm_c.running_var.fill_(2.0)
    encoder = ImageEncoder(module, Card({}, 5, 8))
    other, x = folded(encoder), pictures(4, 8)
    assert sum(isinstance(part, FoldedConv) for part in other.module.modules()) == 1
    torch.testing.assert_close(other(x), module(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inference_copy(encoder)(x), module(x), rtol=1e-5, atol=1e-6)


class Branching(nn.Module):
    """Cannot be traced: what is computed depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3)) if x.sum() > 0 else x.mean((2, 3))


def test_code_that_cannot_be_traced_is_left_alone():
    encoder = ImageEncoder(Branching().eval(), Card({}, 4, 8))
    assert folded(encoder) is encoder
    assert inference_copy(encoder) is encoder


@dataclass(frozen=True)
class Foreign:
    module: nn.Module
    width: int = 4
    input_size: int = 8

    def __call__(self, x, /):
        return self.module(x) * 2


def test_foreign_encoders_may_do_more_than_their_module_and_are_left_alone():
    encoder = Foreign(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert folded(encoder) is encoder
    assert inference_copy(encoder, torch.bfloat16) is encoder
