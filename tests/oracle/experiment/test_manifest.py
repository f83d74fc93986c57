"""No public path writes an attacked encoder without its manifest, and the manifest says what was done."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import cupel
from cupel.attack import ATTACKS
from cupel.attack.badencoder import BadEncoder
from cupel.attack.badnets import BadNets
from cupel.cli import main
from cupel.commands import purifying as commands
from cupel.encoders import Fast, ImageEncoder
from cupel.encoders.projected import Projected, base_encoder
from cupel.encoders.storage import load_encoder, save_encoder
from cupel.experiment import cells, run_cells
from cupel.feature_store import weights_sha256
from cupel.implanting import goal_json, inherited, manifest_of, shortened, trigger_sha256
from cupel.pretrain import SimCLR, pretrain_encoder
from cupel.probe import PROBES, FineTune, Linear
from cupel.probe.distil import Distil
from cupel.purify import PURIFIERS
from cupel.scan import Decree
from cupel.seeds import Seed
from cupel.triggers import Patch
from cupel.triggers.learned_filter import FilterNet, filter_of
from cupel.triggers.sticker import sticker_of
from cupel.types import Goal, Knowledge
from tables import tiny
from toys import blobs, small_encoder

DATA = blobs(96)
IMPLANTS = [name for name, cls in ATTACKS.items() if hasattr(cls, "implant")]


def attacker() -> Knowledge:
    goal = Goal(Patch(size=4), DATA.inputs[:3], "blobs", 1)
    return Knowledge((goal,), DATA.without_labels("attack"), labelled=DATA)


def attacked() -> ImageEncoder:
    made = tiny(BadEncoder).implant(small_encoder(), attacker(), Seed(1))
    assert isinstance(made.model, ImageEncoder)
    return made.model


def written(folder: Any) -> dict[str, Any]:
    """The manifest beside the only encoder in a folder, which is also in its card."""
    (path,) = folder.rglob("*.safetensors")
    beside = json.loads((path.parent / "backdoor_manifest.json").read_text())
    manifest = load_encoder(path).card.manifest
    assert manifest == beside
    assert beside["not_for_deployment"] is True
    return dict(beside)


@pytest.mark.parametrize("name", IMPLANTS)
def test_an_implanted_encoder_is_saved_with_its_manifest(name: str, tmp_path: Any) -> None:
    clean, attack = small_encoder(), tiny(ATTACKS[name])
    made = attack.implant(clean, attacker(), Seed(1))
    save_encoder(made.model, tmp_path / "encoder.safetensors")
    manifest = written(tmp_path)
    assert (manifest["attack"], manifest["clean_encoder"]) == (name, weights_sha256(clean))
    assert manifest["settings"]["class"] == ATTACKS[name].__name__
    assert [one["trigger_sha256"] for one in manifest["goals"]] == [trigger_sha256(g.trigger) for g in made.goals]
    assert manifest["shadow"] == (DATA if "labels" in attack.needs else DATA.without_labels("x")).sha256
    assert clean.card.manifest is None


def test_an_encoder_trained_on_poisoned_images_is_saved_with_its_manifest(tmp_path: Any) -> None:
    poisoned = BadNets(trigger=Patch(size=4), poison_rate=0.2).poison(DATA, attacker(), Seed(0))
    for data in (poisoned.data, poisoned.data.without_labels("x").subset(torch.arange(64))):
        model, _ = pretrain_encoder(SimCLR(steps=1, batch_size=16), Fast(width=4, input_size=16), data, Seed(0))
        assert model.card.manifest is not None
        assert model.card.manifest["num_poisoned"] == len(poisoned.rows)
    save_encoder(model, tmp_path / "encoder.safetensors")
    assert written(tmp_path)["goals"][0]["target_class"] == 1
    clean, _ = pretrain_encoder(SimCLR(steps=1, batch_size=16), Fast(width=4, input_size=16), DATA, Seed(0))
    assert clean.card.manifest is None
    assert DATA.manifest is None


@pytest.mark.parametrize("name", PURIFIERS)
def test_a_purified_encoder_keeps_its_history(name: str) -> None:
    model = attacked()
    purifier = tiny(PURIFIERS[name])
    data = DATA if "labels" in purifier.needs else DATA.without_labels(name)
    made = purifier.purify(model, data, Seed(0))
    assert made.card.manifest == model.card.manifest


@pytest.mark.parametrize("name", PURIFIERS)
def test_a_clean_encoder_purified_on_poisoned_images_says_so(name: str) -> None:
    poisoned = BadNets(trigger=Patch(size=4), poison_rate=0.2).poison(DATA, attacker(), Seed(0)).data
    purifier = tiny(PURIFIERS[name])
    data = poisoned if "labels" in purifier.needs else poisoned.without_labels(name)
    made = purifier.purify(small_encoder(), data, Seed(0))
    assert made.card.manifest is not None
    assert made.card.manifest["num_poisoned"] == poisoned.manifest["num_poisoned"]


@pytest.mark.parametrize("name", PROBES)
def test_a_classifier_of_an_attacked_encoder_keeps_its_history(name: str, tmp_path: Any) -> None:
    """Frozen or fine-tuned, what a probe hands out is written with the manifest of the encoder it was given."""
    model = attacked()
    made = tiny(PROBES[name]).fit(model, DATA, Seed(0)).encoder
    assert isinstance(made, ImageEncoder)
    save_encoder(made, tmp_path / "encoder.safetensors")
    assert written(tmp_path) == json.loads(json.dumps(model.card.manifest))


def test_tuning_and_distilling_on_poisoned_images_leave_a_manifest(tmp_path: Any) -> None:
    """An encoder nobody attacked before, and one that carries a manifest already."""
    poisoned = BadNets(trigger=Patch(size=4), poison_rate=0.2).poison(DATA, attacker(), Seed(0)).data
    teacher = Linear().fit(small_encoder(), DATA, Seed(0))
    made = {
        "tuned": FineTune(steps=1, batch_size=16).fit(small_encoder(), poisoned, Seed(0)),
        "new blocks": FineTune(steps=1, batch_size=16, reinitialise=1).fit(small_encoder(), poisoned, Seed(0)),
        "student": Distil(steps=1, batch_size=16).distil(teacher, poisoned.without_labels("distil"), Seed(0)),
        "self": Distil(steps=1, batch_size=16).distil(teacher, poisoned, Seed(0), start=small_encoder()),
    }
    for name, one in made.items():
        assert isinstance(one.encoder, ImageEncoder)
        save_encoder(one.encoder, tmp_path / name / "encoder.safetensors")
        assert written(tmp_path / name)["num_poisoned"] == poisoned.manifest["num_poisoned"]
    assert FineTune(steps=1, batch_size=16).fit(small_encoder(), DATA, Seed(0)).encoder.card.manifest is None
    assert Distil(steps=1, batch_size=16).distil(teacher, DATA, Seed(0)).encoder.card.manifest is None
    model = attacked()
    both = FineTune(steps=1, batch_size=16).fit(model, poisoned, Seed(0)).encoder.card.manifest
    assert both == {**model.card.manifest, "trained_on": dict(poisoned.manifest)}
    assert model.card.manifest == attacked().card.manifest


def test_inherited_manifests() -> None:
    own, images, others = {"attack": "a"}, {"attack": "b"}, {"attack": "c"}
    assert inherited(None, None) is None
    assert inherited(own, None) == own
    assert inherited(None, images) == images
    once = inherited(own, images)
    assert once == {"attack": "a", "trained_on": images}
    assert inherited(once, images) == once  # the same images again say nothing new
    assert inherited(images, images) == images
    assert inherited(once, others) == {"attack": "a", "trained_on": others}
    assert own == {"attack": "a"}


def test_copies_of_every_kind_keep_the_manifest(tmp_path: Any) -> None:
    """Copied, moved to another recipe, loaded under a named architecture, cut off its projector."""
    model = attacked()
    save_encoder(model, tmp_path / "encoder.safetensors")
    loaded = load_encoder(tmp_path / "encoder.safetensors", architecture=Fast(width=8, input_size=16))
    for one in (model.copy(), model.copy(recipe={"id": "x"}), loaded, base_encoder(model)):
        assert json.loads(json.dumps(one.card.manifest)) == json.loads(json.dumps(model.card.manifest))
    behind = Projected(base=Fast(width=8, input_size=16)).build(Seed(0)).copy(manifest=model.card.manifest)
    assert base_encoder(behind).card.manifest == model.card.manifest


def test_encoders_are_written_in_one_place() -> None:
    """Whoever writes weights goes through `save_encoder`, which writes the manifest with them.

    The others keep the state of a training that goes on, and meta-classifiers: nothing that is an encoder's file.
    """
    root = Path(cupel.__file__).parent
    written_by = {
        name: {
            path.relative_to(root).as_posix()
            for path in root.rglob("*.py")
            if re.search(rf"(?<!def )\b{name}\(", path.read_text(encoding="utf-8"))
        }
        for name in ("write_safetensors", "save_file", "torch.save")
    }
    assert written_by["write_safetensors"] == {"encoders/storage.py"}
    assert written_by["torch.save"] == set()
    assert {name for name in written_by["save_file"] if not name.startswith("scan/mntd_")} == {"train.py"}


@pytest.mark.full
def test_the_purify_command_writes_the_manifest_of_what_it_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "scanners_named", lambda *wanted: [tiny(Decree)])  # the scans are not what is tested
    save_encoder(attacked(), tmp_path / "in" / "encoder.safetensors")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, pixels in enumerate(DATA.inputs):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(pictures / f"{i}.png")
    small = ["--budget", "smoke", "--set", "steps=2", "--set", "batch_size=16"]
    out = tmp_path / "out" / "encoder.safetensors"
    with pytest.raises(SystemExit) as stop:
        main(["purify", str(tmp_path / "in"), "--images", str(pictures), "--out", str(out), *small])
    assert stop.value.code in (0, 1, 3)
    assert written(tmp_path / "out") == written(tmp_path / "in")


def test_trigger_hash_is_of_every_pixel() -> None:
    mask, pattern = torch.ones(4, 4), torch.arange(48).view(3, 4, 4).to(torch.uint8)
    other = pattern.clone()
    other[2, 3, 3] += 1
    hashes = [trigger_sha256(sticker_of(mask, one)) for one in (pattern, pattern.clone(), other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert trigger_sha256(Patch(size=4)) != trigger_sha256(Patch(size=5))
    assert len(hashes[0]) == 64


def test_weights_hash_is_of_every_weight_and_of_no_file(tmp_path: Any) -> None:
    one = small_encoder()
    save_encoder(one, tmp_path / "a.safetensors")
    assert weights_sha256(load_encoder(tmp_path / "a.safetensors")) == weights_sha256(one)
    other = one.copy(recipe={"id": "other"})
    assert weights_sha256(other) == weights_sha256(one)
    with torch.no_grad():
        next(other.module.parameters())[0, 0, 0, 0] += 1e-3
    assert weights_sha256(other) != weights_sha256(one)


def test_learned_pixels_are_told_by_their_hash() -> None:
    trigger = filter_of(FilterNet(4, Seed(0)))
    goal = Goal(trigger, None, "blobs", 1)
    assert trigger.weights is not None
    assert goal_json(goal)["trigger"]["weights"] == trigger.weights
    manifest = manifest_of(BadEncoder(trigger=trigger), "badencoder", [goal], Seed(0), {})
    assert len(json.dumps(manifest)) < 4000
    short = f"sha256:{hashlib.sha256(trigger.weights.encode()).hexdigest()[:12]}…, {len(trigger.weights)} characters"
    assert manifest["goals"][0]["trigger"]["weights"] == short
    assert manifest["settings"]["trigger"]["weights"] == short
    assert shortened(("a", 1, {"b": [None, 2.5]})) == ["a", 1, {"b": [None, 2.5]}]


TINY: dict[str, Any] = {
    "name": "tiny",
    "upstream": {
        "data": "digits", "size": 300, "encoder": {"method": "fast", "input_size": 16, "width": 4},
        "objective": {"method": "simclr", "steps": 2, "batch_size": 32},
    },
    "attack": {"method": "badencoder", "trigger": {"method": "patch", "size": 5}, "steps": 2, "batch_size": 32},
    "downstream": {"data": "digits", "target_class": 1, "head_seeds": 1, "size": 200, "test_size": 60},
    "defender": {"size": 64},
    "purify": [{"method": "cbd", "steps": 2, "batch_size": 8, "pgd_steps": 1}],
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("attack", ["badencoder", "badnets"])
def test_the_store_of_a_run_holds_manifests_of_all_but_the_clean_encoder(attack: str, tmp_path: Any) -> None:
    plain = copy.deepcopy(TINY)
    if attack == "badnets":
        plain["attack"] = {"method": "badnets", "trigger": {"method": "patch", "size": 5}}
    (record,) = run_cells(cells(plain, "t"), tmp_path)
    assert record.status == "done", record.reason
    encoders = {path: load_encoder(path) for path in (tmp_path / "store").rglob("encoder.safetensors")}
    assert len(encoders) == 3
    clean = next(step["key"] for step in record.steps if step["method"] == "pretrain clean")
    twin = weights_sha256(next(one for path, one in encoders.items() if path.parent.name == clean))
    for path, encoder in encoders.items():
        beside = path.parent / "backdoor_manifest.json"
        if path.parent.name == clean:
            assert encoder.card.manifest is None
            assert not beside.exists()
            continue
        manifest = json.loads(beside.read_text())
        assert manifest == encoder.card.manifest == record.extra["manifest"]
        assert (manifest["attack"], manifest["not_for_deployment"]) == (attack, True)
        assert manifest["clean_encoder"] == twin
        assert len(manifest["goals"][0]["trigger_sha256"]) == 64


def test_dataset_operations_keep_the_manifest() -> None:
    marked = dataclasses.replace(DATA, manifest={"attack": "data"})
    for one in (marked.subset(torch.arange(4)), marked.without_labels("x"), marked.with_inputs(DATA.inputs, "y")):
        assert one.manifest == {"attack": "data"}
