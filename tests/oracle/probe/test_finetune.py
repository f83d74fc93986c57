"""Fine-tuning: what is trained and what is not, and that it learns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from cupel.errors import DataError, SettingsError
from cupel.inference import features
from cupel.probe.finetune import FineTune, blocks_of
from cupel.probe.linear import Linear
from cupel.seeds import Seed
from toys import blobs, small_encoder

DATA = blobs(128)


@dataclass(frozen=True)
class Foreign:
    module: nn.Module
    width: int = 4
    input_size: int = 16

    def __call__(self, x, /):
        return self.module(x).mean((2, 3))


def changed(before, after) -> set[str]:
    """Backbone parts in which a tensor moved."""
    return {
        name.split(".")[1]
        for name, value in after.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    }


@pytest.mark.parametrize(
    ("blocks", "moved"),
    [
        (0, set()),
        (1, {"layer3"}),
        (2, {"layer2", "layer3"}),
        (None, {"conv1", "bn1", "layer1", "layer2", "layer3"}),
        (99, {"conv1", "bn1", "layer1", "layer2", "layer3"}),
    ],
)
def test_only_the_last_blocks_move(blocks, moved):
    encoder = small_encoder()
    before = {k: v.clone() for k, v in encoder.module.state_dict().items()}
    made = FineTune(blocks=blocks, epochs=1).fit(encoder, DATA, Seed(0))
    assert changed(encoder.module, made.encoder.module) == moved
    assert all(torch.equal(v, before[k]) for k, v in encoder.module.state_dict().items())
    assert all(p.requires_grad for p in made.encoder.module.parameters())


def test_frozen_batch_norm_stays_bit_for_bit():
    encoder = small_encoder()
    made = FineTune(batch_norm="frozen", epochs=1, precision="fp32").fit(encoder, DATA, Seed(0))
    for (name, a), b in zip(encoder.module.named_modules(), made.encoder.module.modules(), strict=True):
        if isinstance(a, nn.BatchNorm2d):
            assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
        if isinstance(a, nn.Conv2d):
            assert not torch.equal(a.weight, b.weight), name


def test_no_steps_at_the_linear_start_is_the_linear_probe():
    encoder = small_encoder()
    made = FineTune(steps=0).fit(encoder, DATA, Seed(0))
    h = features(encoder, DATA)
    probe = Linear(normalise=False, subsample=1.0).fit_features(h, DATA.labels, 4, Seed(0))
    assert torch.equal(made.head(h), probe(h))


def test_it_learns_what_a_linear_probe_on_a_random_encoder_cannot():
    train, test = blobs(256), blobs(128, seed=1)
    encoder = small_encoder(width=4)
    made = FineTune(epochs=15, head="random", lr=0.05, batch_size=32).fit(encoder, train, Seed(0))
    x = test.inputs.float() / 255
    with torch.no_grad():
        ours = float((made(x).argmax(1) == test.labels).float().mean())
        head = Linear().fit_features(features(encoder, train), train.labels, 4, Seed(0))
        frozen = float((head(features(encoder, test)).argmax(1) == test.labels).float().mean())
    assert ours > 0.9
    assert ours >= frozen


def test_the_seed_decides():
    a, b, c = (FineTune(epochs=1, head="random").fit(small_encoder(), DATA, Seed(s)).head.weight for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_fewer_images_than_a_batch():
    FineTune(epochs=2).fit(small_encoder(), blobs(20), Seed(0))


def test_encoders_it_cannot_take_apart_are_refused():
    with pytest.raises(DataError, match="cannot train a Foreign; use a probe on frozen embeddings"):
        FineTune().fit(Foreign(nn.Conv2d(3, 4, 3)), DATA, Seed(0))


def test_blocks_of_a_resnet_end_with_its_last_stage():
    from cupel.encoders import ResNet18

    names = [type(part).__name__ for part in blocks_of(ResNet18(width_multiplier=0.125).build(Seed(0)).module)]
    assert names == ["Conv2d", "BatchNorm2d", "Sequential", "Sequential", "Sequential", "Sequential"]


@pytest.mark.parametrize(("count", "drawn"), [(1, {"layer3"}), (2, {"layer2", "layer3"}), (9, None)])
def test_the_last_blocks_are_drawn_anew(count, drawn):
    encoder = small_encoder()
    with torch.no_grad():
        for part in encoder.module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.mul_(3)
                part.bias.add_(1)
                part.running_mean.add_(5)
    made = FineTune(reinitialise=count, steps=0).fit(encoder, DATA, Seed(0)).encoder
    blocks = {name for name, _ in encoder.module.backbone.named_children()}
    drawn = drawn or {name for name in blocks if any(True for _ in getattr(encoder.module.backbone, name).parameters())}
    assert changed(encoder.module, made.module) == drawn
    for name, part in made.module.backbone.named_modules():
        if name.split(".")[0] not in drawn:
            continue
        if isinstance(part, nn.BatchNorm2d):
            assert bool((part.weight == 1).all())
            assert bool((part.bias == 0).all())
            assert bool((part.running_mean == 0).all())
            assert bool((part.running_var == 1).all())
        if isinstance(part, nn.Conv2d):
            field = part.weight[0, 0].numel()
            bound = (6 / (field * (part.in_channels + part.out_channels))) ** 0.5  # Glorot and Bengio, 2010, eq. 16
            assert 0.9 * bound < float(part.weight.detach().abs().max()) <= bound
            assert abs(float(part.weight.detach().std()) - bound / 3**0.5) < 0.1 * bound
    again, other = (FineTune(reinitialise=count, steps=0).fit(encoder, DATA, Seed(s)).encoder for s in (0, 1))
    assert not changed(made.module, again.module)
    assert changed(made.module, other.module)


def test_the_head_starts_at_the_encoder_with_new_blocks():
    made = FineTune(reinitialise=1, steps=0).fit(small_encoder(), DATA, Seed(0))
    h = features(made.encoder, DATA)
    probe = Linear(normalise=False, subsample=1.0).fit_features(h, DATA.labels, 4, Seed(0))
    assert torch.equal(made.head(h), probe(h))


def test_new_blocks_that_are_not_trained_are_refused():
    with pytest.raises(SettingsError, match="2 blocks are drawn anew, but only 1 trained"):
        FineTune(reinitialise=2, blocks=1)
    FineTune(reinitialise=2, blocks=2)


def test_a_tuned_encoder_carries_every_manifest():
    own, images = {"attack": "badencoder"}, {"attack": "badnets"}
    poisoned = dataclasses.replace(DATA, manifest=images)
    plain, attacked = small_encoder(), small_encoder().copy(manifest=own)
    probe = FineTune(steps=1)
    assert probe.fit(plain, DATA, Seed(0)).encoder.card.manifest is None
    assert probe.fit(attacked, DATA, Seed(0)).encoder.card.manifest == own
    assert probe.fit(plain, poisoned, Seed(0)).encoder.card.manifest == images
    assert probe.fit(attacked, poisoned, Seed(0)).encoder.card.manifest == {**own, "trained_on": images}
    redrawn = FineTune(steps=1, reinitialise=1)
    assert redrawn.fit(attacked, DATA, Seed(0)).encoder.card.manifest == own
    start = nn.Linear(attacked.width, 4)
    assert probe.tuned(attacked, start, poisoned, Seed(0)).encoder.card.manifest == {**own, "trained_on": images}
