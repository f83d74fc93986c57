"""Encoders that keep projector layers: same base, blocks in order, on disk and back, folded, fine-tuned from there."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import pytest
import torch
from torch import nn

from cupel.augment import SimCLRAugment
from cupel.checkpoint.inspect import inspect_file
from cupel.encoders import Fast, ResNet18
from cupel.encoders.blocks import block_outputs, blocks_of
from cupel.encoders.projected import BASES, Projected, base_encoder, kept_layers, middle_layer
from cupel.encoders.storage import load_encoder, save_encoder
from cupel.errors import CheckpointError, SettingsError
from cupel.folding import FoldedConv, folded, inference_copy
from cupel.inference import features
from cupel.pretrain.simclr_v2 import SimCLRv2
from cupel.probe.finetune import FineTune
from cupel.probe.linear import Linear
from cupel.seeds import Seed
from cupel.settings import OneOf, parse, settings
from fingerprints import same_state
from pretraining import trained
from toys import blobs

SMALL = Fast(width=4, input_size=16)
DATA = blobs(128)
TABLE = {**BASES, "projected": Projected}


@settings
class Read:
    """How a card is read, through the table that `ENCODERS` is."""

    encoder: Annotated[Any, OneOf(TABLE)]


def worn(layers: int = 1, base: object = SMALL, seed: int = 0):
    """As after training: statistics and affine parts that differ from channel to channel."""
    encoder = Projected(base=base, layers=layers).build(Seed(seed))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in encoder.module.modules():
            if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
                part.running_mean.copy_(torch.randn(part.num_features, generator=g) * 0.3)
                part.running_var.copy_(torch.rand(part.num_features, generator=g) + 0.5)
                part.weight.copy_(torch.rand(part.num_features, generator=g) + 0.5)
                part.bias.copy_(torch.randn(part.num_features, generator=g) * 0.2)
    return encoder


def pictures(n: int = 5) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=Seed(1).torch())


BASE = {"fast": SMALL, "resnet18": ResNet18(width_multiplier=0.0625, input_size=16)}


@pytest.mark.parametrize("name", BASE)
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_embedding_is_the_middle_layers_output(name, layers):
    encoder, x = worn(layers, BASE[name]), pictures()
    assert kept_layers(encoder.module) == layers
    assert encoder.width == BASE[name].build(Seed(0)).width
    with torch.no_grad():
        h = base_encoder(encoder)(x)
        state = encoder.module.state_dict()
        for i in range(layers):  # by hand: Wx, standardised by the running statistics, scaled, shifted, cut at 0
            key = f"backbone.projector.{i}."
            z = h @ state[f"{key}0.weight"].T
            z = (z - state[f"{key}1.running_mean"]) / (state[f"{key}1.running_var"] + 1e-5).sqrt()
            h = (z * state[f"{key}1.weight"] + state[f"{key}1.bias"]).clamp_min(0)
            assert f"{key}0.bias" not in state
        torch.testing.assert_close(encoder(x), h, rtol=1e-4, atol=1e-5)


def test_the_base_is_what_the_base_alone_would_be():
    encoder, alone = Projected(base=SMALL, layers=2).build(Seed(7)), SMALL.build(Seed(7))
    assert same_state(base_encoder(encoder).module, alone.module)
    assert not torch.equal(
        encoder.module.backbone.projector[0][0].weight, encoder.module.backbone.projector[1][0].weight
    )
    before = torch.get_rng_state()
    middle_layer(4, Seed(3))
    assert torch.equal(before, torch.get_rng_state())


def test_base_encoder_is_a_copy_with_a_card_of_its_own():
    encoder = worn().copy(recipe={"id": "r"}, manifest={"attack": "badencoder"}, source={"file": "f"})
    made = base_encoder(encoder)
    assert made.card.architecture == {"method": "fast", **dataclasses.asdict(SMALL)}
    assert (made.card.recipe, made.card.manifest) == ({"id": "r"}, {"attack": "badencoder"})
    assert made.card.source == {"file": "f"}
    assert not any(part.training for part in made.module.modules())
    with torch.no_grad():
        made.module.backbone.conv1.weight.add_(1)
    assert not torch.equal(made.module.backbone.conv1.weight, encoder.module.backbone.conv1.weight)
    plain = SMALL.build(Seed(0))
    assert same_state(base_encoder(plain).module, plain.module)
    assert kept_layers(plain.module) == 0


def test_a_copy_is_independent_and_alike():
    encoder, x = worn(2), pictures()
    other = encoder.copy()
    with torch.no_grad():
        assert torch.equal(other(x), encoder(x))
        other.module.backbone.projector[0][0].weight.zero_()
        assert not torch.equal(other(x), encoder(x))
    assert kept_layers(other.module) == 2


def test_blocks_end_with_the_projector():
    names = [type(part).__name__ for part in blocks_of(worn(2).module)]
    assert names == ["Conv2d", "BatchNorm2d", "BasicBlock", "BasicBlock", "BasicBlock", "Sequential"]
    assert len(blocks_of(worn(0).module)) == 5
    encoder = worn(1)
    with block_outputs(encoder.module, -1) as seen:
        h = encoder(pictures())
    assert torch.equal(seen[0], h)


@pytest.mark.parametrize(("blocks", "moved"), [(1, {"projector"}), (2, {"projector", "layer3"})])
def test_partial_fine_tuning_begins_at_the_projector(blocks, moved):
    encoder = worn()
    made = FineTune(blocks=blocks, epochs=1).fit(encoder, DATA, Seed(0)).encoder
    a, b = encoder.module.state_dict(), made.module.state_dict()
    assert {name.split(".")[1] for name in a if not torch.equal(a[name], b[name])} == moved


def test_card_names_the_base_and_builds_it_again():
    card = json.loads(json.dumps(worn(2).card.to_json()))
    assert card["architecture"]["base"]["method"] == "fast"
    assert parse(Read, {"encoder": card["architecture"]}, "card").encoder == Projected(base=SMALL, layers=2)


def test_round_trip_by_architecture(tmp_path):
    encoder = worn(2).copy(recipe={"id": "r", "text": "t"})
    save_encoder(encoder, tmp_path / "e.safetensors")
    again = load_encoder(tmp_path / "e.safetensors", Projected(base=SMALL, layers=2))
    assert same_state(encoder.module, again.module)
    assert again.card.architecture == encoder.card.architecture
    assert again.card.recipe == {"id": "r", "text": "t"}
    with torch.no_grad():
        assert torch.equal(again(pictures()), encoder(pictures()))
    assert inspect_file(tmp_path / "e.safetensors").verdict == "ok"
    with pytest.raises(CheckpointError, match=r"projector\.2"):
        load_encoder(tmp_path / "e.safetensors", Projected(base=SMALL, layers=3))


def test_round_trip_by_card(tmp_path):
    save_encoder(worn(2), tmp_path / "e.safetensors")
    again = load_encoder(tmp_path / "e.safetensors")
    assert same_state(worn(2).module, again.module)
    assert kept_layers(again.module) == 2


def test_the_file_loads_as_its_base(tmp_path):
    encoder = worn()
    save_encoder(encoder, tmp_path / "e.safetensors")
    plain = load_encoder(tmp_path / "e.safetensors", SMALL)
    assert same_state(plain.module, base_encoder(encoder).module)


def test_folding_keeps_values_and_gradients():
    encoder, x = worn(2), pictures()
    other = folded(encoder)
    assert sum(isinstance(part, FoldedConv) for part in other.module.modules()) == 9
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(other(x), encoder(x), **near)
    torch.testing.assert_close(inference_copy(encoder)(x), encoder(x).detach(), **near)
    weights = [p for name, p in encoder.module.named_parameters() if "bn" not in name and "downsample.1" not in name]
    ours = torch.autograd.grad(other(x).square().sum(), weights)
    theirs = torch.autograd.grad(encoder(x).square().sum(), weights)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_features_in_bf16_agree():
    encoder = worn(1)
    exact, quick = (features(encoder, DATA, dtype=one) for one in (torch.float32, torch.bfloat16))
    assert exact.shape == (128, 16)
    assert float(nn.functional.cosine_similarity(exact, quick).min()) > 0.999


def test_bad_settings():
    with pytest.raises(SettingsError, match="layers"):
        Projected(layers=-1)
    with pytest.raises(SettingsError, match="base"):
        Projected(base=Projected())
    with pytest.raises(SettingsError, match=r"encoder\.base: unknown method 'projected'"):
        parse(Projected, {"base": {"method": "projected"}}, "encoder")
    assert Projected(base=SMALL).input_size == 16


def test_fine_tuned_from_the_middle_layer_it_beats_a_random_encoder():
    train, few, test = blobs(256), blobs(24, seed=5), blobs(256, seed=1)
    objective = SimCLRv2(
        steps=60, batch_size=64, lr=3e-3, temperature=0.2, augment=SimCLRAugment(min_scale=0.8, flip=0.0)
    )
    architecture = Projected(base=Fast(width=8, input_size=16))
    encoder, _, _ = trained(objective, train, architecture)
    encoder.module.eval()
    x = test.inputs.float() / 255

    def accuracy(probe, encoder) -> float:
        made = probe.fit(encoder, few, Seed(0))
        with torch.no_grad():
            return float((made(x).argmax(1) == test.labels).float().mean())

    tuning = FineTune(epochs=25, batch_size=8)
    ours, fresh = accuracy(tuning, encoder), accuracy(tuning, architecture.build(Seed(3).child("init")))

    assert ours > fresh + 0.1
    assert accuracy(tuning, base_encoder(encoder)) > fresh + 0.1
    assert accuracy(Linear(), encoder) > 0.5
