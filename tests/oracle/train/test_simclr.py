"""SimCLR and the encoders: shapes, presets, and a smoke run that learns something."""

from __future__ import annotations

import pytest
import torch
import torchvision

from cupel import metrics
from cupel.encoders import Fast, ResNet18, ResNet50
from cupel.inference import features
from cupel.pretrain import SimCLR
from cupel.probe import Knn
from cupel.seeds import Seed
from toys import blobs, small_encoder, trained_encoder


def test_cifar_stem_has_torchvisions_weights_but_for_the_first():
    encoder = ResNet18().build(Seed(0))
    reference = torchvision.models.resnet18(weights=None)
    ours = sum(p.numel() for p in encoder.module.parameters())
    theirs = sum(p.numel() for p in reference.parameters()) - sum(p.numel() for p in reference.fc.parameters())
    assert ours == theirs - (7 * 7 - 3 * 3) * 3 * 64
    assert encoder.width == 512
    assert set(encoder.module.backbone.state_dict()) == {k for k in reference.state_dict() if not k.startswith("fc")}


@pytest.mark.parametrize(("padding", "side"), [(1, 32), (2, 34)])
def test_stem_padding(padding, side):
    net = ResNet18(stem_padding=padding, width_multiplier=0.125).build(Seed(0)).module.backbone
    assert net.conv1(torch.zeros(1, 3, 32, 32)).shape[-1] == side


def test_width_multiplier():
    encoder = ResNet18(width_multiplier=0.25).build(Seed(0))
    assert encoder.width == 128
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, 128)


@pytest.mark.full
@pytest.mark.parametrize("made", [ResNet18(stem="imagenet", input_size=224), ResNet50()])
def test_224_encoders(made):
    encoder = made.build(Seed(0))
    assert encoder(torch.rand(1, 3, 224, 224)).shape == (1, encoder.width)


def test_normalisation_is_inside():
    encoder = Fast(width=4, input_size=16, normalisation="cifar10").build(Seed(0))
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    x = torch.rand(2, 3, 16, 16)
    inner = encoder.module.backbone((x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    assert torch.allclose(encoder(x), inner, atol=1e-6)


def test_initialisation_follows_the_seed():
    a, b, c = (small_encoder(s).module.backbone.conv1.weight for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_published_presets():
    ours = SimCLR.preset("badencoder")
    assert (ours.optimizer, ours.lr, ours.weight_decay, ours.batch_size, ours.epochs) == ("adam", 1e-3, 1e-6, 256, 1000)
    assert (ours.temperature, ours.schedule) == (0.5, "constant")
    google = SimCLR.preset("google_cifar")
    assert (google.optimizer, google.lr, google.batch_size, google.temperature) == ("lars", 2.0, 512, 0.5)


def test_both_projectors():
    encoder = small_encoder()
    deep = SimCLR().learner(encoder, blobs(32), Seed(0)).projector
    plain = SimCLR(projector="plain", projector_width=20, projection=6).learner(encoder, blobs(32), Seed(0)).projector
    assert [type(m).__name__ for m in deep] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert deep[0].bias is None
    assert plain(torch.rand(2, 32)).shape == (2, 6)
    assert plain[0].out_features == 20


def test_a_few_steps_beat_a_random_encoder():
    data = blobs(512)
    bank, queries = data.subset(torch.arange(256)), data.subset(torch.arange(256, 512))

    def accuracy(encoder):
        head = Knn(k=10).fit_features(features(encoder, bank), bank.labels, 4, Seed(0))
        right, n = metrics.accuracy(head(features(encoder, queries)).argmax(1), queries.labels)
        return right / n

    assert accuracy(trained_encoder(data)) >= accuracy(small_encoder(1)) + 0.05
