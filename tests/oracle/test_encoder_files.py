"""Encoders on disk: a round trip, other people's layouts, and files that do not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cupel.encoders import Fast, ResNet18
from cupel.encoders.storage import load_encoder, save_encoder
from cupel.errors import CheckpointError, UnsafeFile
from cupel.seeds import Seed
from toys import small_encoder


def equal(a, b) -> bool:
    ours, theirs = a.module.state_dict(), b.module.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_round_trip(tmp_path):
    encoder = small_encoder(3).copy(recipe={"id": "r", "text": "t"})
    save_encoder(encoder, tmp_path / "e.safetensors")
    again = load_encoder(tmp_path / "e.safetensors")
    assert equal(encoder, again)
    assert again.card.recipe == {"id": "r", "text": "t"}
    assert again.card.architecture == encoder.card.architecture
    assert json.loads((tmp_path / "e.safetensors.json").read_text())["width"] == 32
    assert not (tmp_path / "backdoor_manifest.json").exists()


def test_a_backdoored_encoder_always_carries_its_manifest(tmp_path):
    encoder = small_encoder().copy(manifest={"attack": "badencoder", "not_for_deployment": True})
    save_encoder(encoder, tmp_path / "e.safetensors")
    (tmp_path / "backdoor_manifest.json").unlink()
    (tmp_path / "e.safetensors").rename(tmp_path / "innocent.bin")
    assert load_encoder(tmp_path / "innocent.bin").card.manifest["attack"] == "badencoder"


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.encoder_q.", "_orig_mod."])
def test_torch_checkpoints_in_the_usual_layouts(tmp_path, prefix, wrap):
    net = ResNet18(width_multiplier=0.125).build(Seed(1))
    state = {prefix + k: v for k, v in net.module.backbone.state_dict().items()}
    state |= {"fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}
    torch.save(wrap(state), tmp_path / "c.pth")
    read = load_encoder(tmp_path / "c.pth")
    assert equal(net, read)
    assert any("fc.weight" in name for name in read.card.source["ignored"])


def test_missing_keys_are_named(tmp_path):
    state = small_encoder().module.backbone.state_dict()
    del state["layer2.conv1.weight"]
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"layer2\.conv1\.weight") as caught:
        load_encoder(tmp_path / "c.pt", Fast(width=8, input_size=16))
    assert caught.value.exit_code == 2


def test_unexpected_keys_are_an_error(tmp_path):
    state = small_encoder().module.backbone.state_dict() | {"secret.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"secret\.weight"):
        load_encoder(tmp_path / "c.pt", Fast(width=8, input_size=16))


def test_wrong_architecture(tmp_path):
    torch.save(small_encoder().module.backbone.state_dict(), tmp_path / "c.pt")
    with pytest.raises(CheckpointError):
        load_encoder(tmp_path / "c.pt", ResNet18())


def test_nothing_fits(tmp_path):
    save_file({"a": torch.zeros(3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no known architecture"):
        load_encoder(tmp_path / "x.safetensors")


def test_nan_weights_are_refused(tmp_path):
    state = small_encoder().module.backbone.state_dict()
    state["layer1.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"layer1\.conv1\.weight"):
        load_encoder(tmp_path / "c.pt")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated(tmp_path, share):
    save_encoder(small_encoder(), tmp_path / "e.safetensors")
    whole = (tmp_path / "e.safetensors").read_bytes()
    (tmp_path / "e.safetensors").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError) as caught:
        load_encoder(tmp_path / "e.safetensors")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_file_that_asks_for_code(tmp_path):
    class Bad:
        def __reduce__(self):
            return __import__("os").system, ("exit 1",)

    torch.save({"conv1.weight": torch.zeros(2), "x": Bad()}, tmp_path / "c.pt")
    with pytest.raises(UnsafeFile) as caught:
        load_encoder(tmp_path / "c.pt")
    assert caught.value.exit_code == 1


def test_a_damaged_card(tmp_path):
    from cupel.checkpoint import write_safetensors

    state = {k: v.numpy() for k, v in small_encoder().module.backbone.state_dict().items()}
    write_safetensors(tmp_path / "e.safetensors", {k: np.array(v) for k, v in state.items()}, {"schema": 1, "width": 3})
    with pytest.raises(CheckpointError, match="card"):
        load_encoder(tmp_path / "e.safetensors")
