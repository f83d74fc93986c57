"""SimCLR v2: the deeper head, which of its layers stay with the encoder, and that the split changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cupel.augment import SimCLRAugment
from cupel.encoders import Fast
from cupel.encoders.projected import Projected
from cupel.errors import SettingsError
from cupel.inference import features
from cupel.losses import nt_xent
from cupel.pretrain.simclr_v2 import SimCLRv2, last_layer
from cupel.probe import Knn
from cupel.seeds import Seed
from pretraining import assert_resumes_bit_equal, assert_steps_count_what_moves, batch, trained
from toys import blobs, small_encoder

TINY = SimCLRv2(steps=6, batch_size=16, projection=6)
SMALL = Fast(width=4, input_size=16)


def head_of(objective: SimCLRv2, architecture=SMALL) -> nn.Sequential:
    return objective.learner(architecture.build(Seed(0)), blobs(32), Seed(0)).projector


def test_head_has_three_linear_layers_with_batch_norm_after_each():
    head = head_of(TINY)
    names = [[type(part).__name__ for part in layer] for layer in head]
    assert names == [["Linear", "BatchNorm1d", "ReLU"], ["Linear", "BatchNorm1d", "ReLU"], ["Linear", "BatchNorm1d"]]
    shapes = [tuple(layer[0].weight.shape) for layer in head]
    assert shapes == [(16, 16), (16, 16), (6, 16)]
    assert all(layer[0].bias is None for layer in head), "BatchNorm's shift is the bias"
    assert [layer[1].bias is not None for layer in head] == [True, True, False]
    assert all(layer[1].weight is not None for layer in head)
    weights = [layer[0].weight for layer in head[:2]]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(("layers", "kept", "left"), [(3, 0, 3), (3, 1, 2), (3, 2, 1), (2, 1, 1), (5, 1, 4)])
def test_what_the_encoder_keeps_is_not_made_twice(layers, kept, left):
    objective = SimCLRv2(projector_layers=layers, projection=6)
    assert len(head_of(objective, Projected(base=SMALL, layers=kept))) == left


def test_an_encoder_that_keeps_all_layers_is_refused():
    with pytest.raises(SettingsError, match="keeps 3 layers of a projector that has 3") as caught:
        head_of(SimCLRv2(), Projected(base=SMALL, layers=3))
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match="projector_layers"):
        SimCLRv2(projector_layers=1)


def test_last_layer_by_hand():
    layer, x = last_layer(5, 3, Seed(0)), torch.randn(8, 5, generator=Seed(1).torch())
    with torch.no_grad():
        layer[1].weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    z = x @ layer[0].weight.T
    expected = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() * torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(layer(x), expected)
    assert float(layer(x).detach().mean(0).abs().max()) < 1e-6, "no shift"


@pytest.mark.parametrize("kept", [1, 2])
def test_where_the_encoder_ends_changes_nothing_of_the_training(kept):
    """With the same weights, loss and every gradient are those of the encoder that keeps no layer."""
    plain, split = SMALL.build(Seed(0)), Projected(base=SMALL, layers=kept).build(Seed(0))
    one, other = (TINY.learner(encoder, blobs(32), Seed(0)) for encoder in (plain, split))
    with torch.no_grad():
        for i, layer in enumerate([*split.module.backbone.projector, *other.projector]):
            layer.load_state_dict(one.projector[i].state_dict())
    (first, _), (second, _) = one.loss(batch()), other.loss(batch())
    assert torch.equal(first, second)
    first.backward()
    second.backward()
    ours = [p.grad for p in [*plain.module.parameters(), *one.projector.parameters()]]
    theirs = [p.grad for p in [*split.module.parameters(), *other.projector.parameters()]]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_loss_by_hand():
    objective = SimCLRv2(batch_size=16, projection=6, temperature=0.3)
    learner = objective.learner(SMALL.build(Seed(0)), blobs(32), Seed(0))
    loss, numbers = learner.loss(batch())
    views = objective.augment(torch.cat([batch().inputs] * 2), Seed(0).torch())
    z = views
    for part in (learner.state["encoder"], *learner.projector):
        z = part(z)
    torch.testing.assert_close(loss, nt_xent(z[:16], z[16:], 0.3))
    assert numbers["feature_std"] > 0


def test_presets():
    google = SimCLRv2.preset("google_cifar")
    assert (google.optimizer, google.lr, google.weight_decay, google.batch_size) == ("lars", 2.0, 1e-4, 512)
    assert (google.epochs, google.warmup_steps, google.temperature) == (1000, 970, 0.5)
    assert (google.projector_layers, google.projection) == (3, 128)
    assert SimCLRv2.preset("fast").steps == 600


def test_resume_is_bit_equal(tmp_path):
    assert_resumes_bit_equal(TINY, tmp_path)


def test_resume_is_bit_equal_on_an_encoder_that_keeps_a_layer(tmp_path, monkeypatch):
    import pretraining

    monkeypatch.setattr(pretraining, "Fast", lambda **sizes: Projected(base=Fast(**sizes)))
    assert_resumes_bit_equal(TINY, tmp_path)


def test_steps_count_what_moves():
    assert_steps_count_what_moves(TINY)


def test_it_learns():
    data, held = blobs(256), blobs(128, seed=1)
    objective = SimCLRv2(
        steps=60, batch_size=64, lr=3e-3, temperature=0.2, augment=SimCLRAugment(min_scale=0.8, flip=0.0)
    )

    def knn(encoder) -> float:
        encoder.module.eval()
        head = Knn(k=10).fit_features(features(encoder, data), data.labels, 4, Seed(0))
        return float((head(features(encoder, held)).argmax(1) == held.labels).float().mean())

    encoder, _, history = trained(objective, data, Fast(width=8, input_size=16))
    assert sum(history["loss"][-5:]) < sum(history["loss"][:5]) - 1
    assert knn(encoder) > knn(small_encoder(1)) + 0.2
