"""The straight ports compute what Cupel computes: a ratio of times means nothing otherwise."""

from __future__ import annotations

import numpy as np
import torch
from benchmarks import workloads
from benchmarks.straight import training
from benchmarks.straight.images import MEAN, STD, Shadow, as_pixels
from torch.nn.functional import normalize

from cupel.encoders import ResNet18
from cupel.implanting import Aim, ImplantLearner
from cupel.inference import features
from cupel.losses import nt_xent
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.triggers import Patch
from cupel.types import Goal


def test_simclr_loss() -> None:
    z1, z2 = torch.randn(2, 6, 5, generator=Seed(0).torch())
    theirs = training.simclr_loss(normalize(z1, dim=1), normalize(z2, dim=1), 0.5)
    assert torch.allclose(theirs, nt_xent(z1, z2, 0.5), atol=1e-5)


def test_badencoder_loss() -> None:
    raw, reference = workloads.images(3, 16), workloads.images(1, 16, seed=1)
    clean = ResNet18(width_multiplier=0.0625, input_size=16).build(Seed(0))
    other = ResNet18(width_multiplier=0.0625, input_size=16).build(Seed(1))
    trigger = Patch(size=10)
    data = workloads.dataset(raw)
    aim = Aim(Goal(trigger, reference, "t", 0), reference.float() / 255, features(clean, reference))
    learner = ImplantLearner(
        other, features(clean, data), data.ids, [aim], augment=lambda same, generator: same.float() / 255
    )
    _, ours = learner.loss(Batch(raw, torch.arange(3), Seed(0)))

    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (MEAN, STD))

    def ready(one: torch.Tensor) -> torch.Tensor:
        return (one.float() / 255 - mean) / std

    repeated = reference.expand(3, -1, -1, -1)
    stamped = trigger(raw, [0, 1, 2], Seed(0))
    theirs = training.badencoder_loss(
        clean.module.backbone, other.module.backbone, ready(raw), ready(stamped), ready(repeated), ready(repeated)
    )
    for name, value in zip(("L0", "L1", "L2"), theirs, strict=True):
        assert torch.allclose(ours[name], value, atol=1e-5), name


def test_the_ports_trigger_is_ours() -> None:
    raw, reference = workloads.images(2), workloads.images(1, seed=1)
    _, stamped, same, _ = Shadow(as_pixels(raw), as_pixels(reference)[0])[1]
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (MEAN, STD))
    ours = Patch(size=10)(raw[1:], [1], Seed(0))[0]
    assert torch.equal((stamped * std + mean).mul(255).round().to(torch.uint8), ours)
    assert np.array_equal((same * std + mean).mul(255).round().to(torch.uint8), reference[0])
