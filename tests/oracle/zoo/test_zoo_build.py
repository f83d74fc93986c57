"""A tiny zoo is made, interrupted, resumed and scanned."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import yaml

from cupel.errors import CupelError, UsageError
from cupel.experiment import Store
from cupel.experiment.run import Runner
from cupel.feature_store import weights_sha256
from cupel.records import Record
from cupel.scan import Decree
from cupel.scan.mntd_reference import Meta, MetaReference
from cupel.seeds import Seed
from cupel.verdicts import Verdict
from cupel.zoo.command import zoo_build, zoo_table
from cupel.zoo.entries import read_entries
from cupel.zoo.file import read_zoo
from cupel.zoo.making import build, steps_of

OBJECTIVE = {"method": "simclr", "steps": 4, "batch_size": 32}
ENCODER = {"method": "fast", "input_size": 16, "width": 4}
ATTACK = {"method": "badencoder", "steps": 3, "batch_size": 16, "l1_draws": 2}


def look(seed, color):
    return {color: {"seed": seed, "attack.trigger": {"method": "patch", "size": 4, "color": color}}}


ZOO = {
    "name": "zoo-tiny",
    "base": {
        "upstream": {"data": "digits", "size": 200, "encoder": ENCODER, "objective": OBJECTIVE},
        "downstream": {"data": "digits", "head_seeds": 1, "size": 100, "test_size": 60},
        "defender": {"size": 80},
        "attacker": {"shadow": {"size": 64}},
    },
    "scan": [{"method": "decree", "steps": 3, "batch_size": 8, "num_seeds": 2, "success": 0.01, "precision": "fp32"}],
    "families": {
        "clean": {"calibration": {"seed": [1]}, "test": {"seed": [11]}},
        "patch": {
            "changes": {"attack": ATTACK, "downstream.target_class": 1},
            "calibration": {"look": look(1, "white")},
            "test": {"look": look(11, "red")},
        },
    },
}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "zoo-tiny.yaml"
    path.write_text(yaml.safe_dump(ZOO))
    return path


def pretrained(out):
    return len(list((out / "store" / "pretrain").iterdir()))


@pytest.mark.full
def test_a_zoo_is_built_in_parts_and_again(tmp_path, source, capsys):
    zoo, out = read_zoo(source), tmp_path / "zoo"
    first = build(zoo, out, "clean", limit=1)
    assert (first.done, first.stored, first.left) == (1, 0, 1)
    assert build(zoo, out, "scan").left == 3  # what is not made yet is not made by scanning
    assert zoo_build(str(source), out, "attacked", None, False) == 0
    assert "2 made, 0 stored, 0 left, 0 failed" in capsys.readouterr().out
    assert pretrained(out) == 2  # clean encoders are shared by the attacked ones
    assert not any(one.scans for one in read_entries([out]).entries if one.backdoored)
    whole = build(zoo, out)
    assert (whole.done, whole.stored, whole.left) == (3, 1, 0)  # one was scanned before
    assert pretrained(out) == 2
    made = {path.name: Record.read(path) for path in (out / "cells").iterdir()}
    again = build(zoo, out)
    assert (again.done, again.stored, again.left) == (0, 4, 0)
    for name, before in made.items():  # how it was made stays as it was
        after = Record.read(out / "cells" / name)
        assert (after.steps, after.seconds) == (before.steps, before.seconds)
        assert len(after.steps) > 1
    found = read_entries([out])
    assert {one.half for one in found.entries} == {"calibration", "test"}
    assert all(one.scans.keys() == set(found.scanners) for one in found.entries)
    bad = [one for one in found.entries if one.backdoored]
    assert len(bad) == 2
    assert all(one.success is not None and one.area == 16 / 256 for one in bad)
    record = Record.read(out / "cells" / f"{bad[0].name}.json")
    assert {"backdoored_accuracy", "attack_success_rate", "attack_success_rate_baseline"} <= set(record.metrics)
    scanned = record.extra["zoo"]["scans"][found.scanners[0]]
    assert set(scanned["overlap"] or {"iou": 0, "distance": 0}) == {"iou", "distance"}
    assert zoo_table([out], None, "json") == 0  # too few to calibrate: no rows, but costs
    assert '"rows": []' in capsys.readouterr().out


@pytest.mark.full
def test_a_member_that_fails_does_not_stop_the_others(tmp_path, source):
    plain = copy.deepcopy(ZOO)
    plain["families"]["patch"]["changes"]["downstream.target_class"] = 99
    source.write_text(yaml.safe_dump(plain))
    out = tmp_path / "zoo"
    made = build(read_zoo(source), out, "attacked")
    assert [one.status for one in made.failed] == ["failed"] * 2
    assert "99" in made.failed[0].reason
    assert zoo_build(str(source), out, "clean", None, False) == 0
    found = read_entries([out])
    assert len(found.failed) == 2
    assert len(found.entries) == 2


@pytest.mark.full
def test_shadow_models_are_made_once_from_the_calibration_half(tmp_path, source, monkeypatch):
    trained, given = [], []

    class Shadowed(Decree):
        def train_reference(self, base, data, seed, *, checkpoint=None):
            trained.append((weights_sha256(base), data.withheld_from, checkpoint.parent.is_dir()))
            arrays = Meta(torch.zeros(2, 3, 16, 16), 1, 4, Seed(0)).state_dict()
            plain = {name: one.numpy() for name, one in arrays.items()}
            return MetaReference("shadowed", "shadows", (0.0,) * 8, plain, False, 0.9, 0.5, 16)

        def scan(self, model, clean, seed, reference=None):
            given.append(reference.auc)
            return Verdict("clean-by-test", 0.1, 0.5, "nothing", reason="a stub")

    zoo = dataclasses.replace(read_zoo(source), scanners=(Shadowed(steps=3),), chain=())
    out = tmp_path / "zoo"
    made = build(zoo, out)
    assert made.failed == ()
    assert zoo.members[0].half == "calibration"
    encoder = Runner(Store(out / "store"), "cpu").value(steps_of(zoo.members[0], zoo).encoder).encoder
    assert trained == [(weights_sha256(encoder), "Shadowed", True)]  # once for all four
    assert given == [0.9] * 4
    entries = read_entries([out]).entries
    assert [len(one.scans) for one in entries] == [1] * 4
    assert build(zoo, out).stored == 4
    assert len(given) == 4

    def refuse(self, *_):
        raise CupelError("decree", "says no")

    monkeypatch.setattr(Shadowed, "scan", refuse)
    once_more = build(dataclasses.replace(zoo, scanners=(Shadowed(steps=4),)), out)
    assert [one.notes[0].partition("scan ")[2].partition(": ")[2].partition(": ")[2] for one in once_more.failed] == [
        "decree: says no"
    ] * 4
    assert [one.status for one in once_more.failed] == ["done"] * 4  # the encoders stand


def test_a_folder_belongs_to_one_zoo_and_a_dry_run_makes_nothing(tmp_path, source, capsys):
    out = tmp_path / "zoo"
    assert zoo_build(str(source), out, None, None, True) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["test", "backdoored", "patch-test--look=red"]
    assert not out.exists()
    out.mkdir()
    (out / "members.json").write_text('{"zoo": "other"}')
    with pytest.raises(UsageError, match="holds the zoo other, not zoo-tiny"):
        build(read_zoo(source), out)
