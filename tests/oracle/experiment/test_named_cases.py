"""Grids with named cases, scales, rows without data, shadow images from outside, and scores under distortions."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from cupel.distort import Jpeg, Shift
from cupel.errors import SettingsError
from cupel.experiment import Store, cells, plan, run_cells
from cupel.experiment.run import cell_name, run_cell
from cupel.experiment.scoring import score
from cupel.experiment.stages import STAGES, Context
from cupel.inference import features, triggered
from cupel.probe import FineTune, Linear
from cupel.records import Record
from cupel.seeds import Seed
from cupel.triggers import Patch
from toys import blobs, small_encoder

TINY = {
    "name": "tiny",
    "upstream": {
        "data": "digits",
        "size": 300,
        "encoder": {"method": "fast", "input_size": 16, "width": 8},
        "objective": {"method": "simclr", "steps": 4, "batch_size": 64},
    },
    "attack": {
        "method": "badencoder",
        "trigger": {"method": "patch", "size": 5},
        "steps": 2,
        "batch_size": 32,
        "lr": 0.05,
    },
    "downstream": {"data": "digits", "target_class": 1, "head_seeds": 2},
}
DISTORTIONS = [{"method": "jpeg", "quality": 50}, {"method": "shift", "pixels": 2}]


def tiny(**changes):
    return {**copy.deepcopy(TINY), **changes}


def keys(experiment) -> dict[str, str]:
    return {step.name: step.key for step in plan(experiment)}


def test_named_cases_change_several_keys_and_name_the_cells():
    grid = {
        "loss terms": {"all": {}, "only L0": {"attack.lambda_reference": 0.0, "attack.lambda_utility": 0.0}},
        "seed": [0, 1],
    }
    found = cells(tiny(grid=grid), "t.yaml")
    seen = [(p["loss terms"], e.seed, e.attack.lambda_reference, e.attack.lambda_utility) for p, e in found]
    assert seen == [("all", 0, 1.0, 1.0), ("all", 1, 1.0, 1.0), ("only L0", 0, 0.0, 0.0), ("only L0", 1, 0.0, 0.0)]
    assert cell_name(found[2][1], found[2][0]) == "tiny--loss_terms=only_L0--seed=0"


@pytest.mark.parametrize(
    ("grid", "where"),
    [
        ({"a": {"x": 3}}, r"t\.yaml\.grid\.a"),
        ({"a": {}}, r"t\.yaml\.grid\.a"),
        ({"a": []}, r"t\.yaml\.grid\.a"),
        ({"a": {"x": {"attack.lamda": 1}}}, "unknown key 'lamda'"),
        ([1], r"t\.yaml\.grid"),
    ],
)
def test_wrong_grids_are_one_line(grid, where):
    with pytest.raises(SettingsError, match=where) as caught:
        cells(tiny(grid=grid), "t.yaml")
    assert "\n" not in str(caught.value)


def test_a_scale_comes_before_other_changes_and_names_the_experiment():
    scales = {"gpu": {"upstream.objective.steps": 50, "attack.steps": 20, "grid": {"seed": [3, 4]}}}
    plain = tiny(scales=scales, grid={"attack.lr": [0.1, 0.2]})
    assert [e.name for _, e in cells(plain, "t")] == ["tiny", "tiny"]
    assert [e.name for _, e in cells(plain, "t", ["scale=cpu"])] == ["tiny", "tiny"]
    found = cells(plain, "t", ["attack.steps=7", "scale=gpu"])
    assert [(p, e.name, e.upstream.objective.steps, e.attack.steps) for p, e in found] == [
        ({"seed": s}, "tiny-gpu", 50, 7) for s in (3, 4)
    ]
    with pytest.raises(SettingsError, match=r"unknown scale 'gpo'; did you mean 'gpu'"):
        cells(plain, "t", ["scale=gpo"])
    with pytest.raises(SettingsError, match=r"t\.scales"):
        cells(tiny(scales=[1]), "t")


def test_distortions_change_the_scores_keys_alone():
    plain, more = tiny(), tiny()
    more["downstream"]["distortions"] = DISTORTIONS
    a, b = keys(cells(plain, "t")[0][1]), keys(cells(more, "t")[0][1])
    assert {name for name in a if a[name] != b[name]} == {"score digits: clean", "score digits: backdoored"}


def test_shadow_images_from_outside_are_none_of_the_pre_trainings():
    plain = tiny(attacker={"shadow": {"disjoint": True, "size": 150}})
    check = next(step for step in plan(cells(plain, "t")[0][1]) if step.stage == "check")
    roles = {s.method["role"]: STAGES["data"](s, [], Context("cpu", None)) for s in check.inputs}
    assert len(roles["shadow"]) == 150
    assert not set(roles["shadow"].content()) & set(roles["pre-training"].content())
    plain["upstream"]["data"] = "shapes"  # rendered: as many more as are wanted
    check = next(step for step in plan(cells(plain, "t")[0][1]) if step.stage == "check")
    roles = {s.method["role"]: STAGES["data"](s, [], Context("cpu", None)) for s in check.inputs}
    assert (len(roles["shadow"]), len(roles["pre-training"])) == (150, 300)
    assert not set(roles["shadow"].content()) & set(roles["pre-training"].content())


@pytest.mark.parametrize("shadow", [{"disjoint": True, "data": "shapes"}, {"disjoint": True}])
def test_outside_of_what(shadow):
    plain = tiny(attacker={"shadow": shadow})
    if "data" not in shadow:
        plain["upstream"].pop("size")
    with pytest.raises(SettingsError, match=r"shadow\.disjoint.*set `upstream\.size`"):
        plan(cells(plain, "t")[0][1])


@pytest.mark.parametrize("probe", [Linear(), FineTune(steps=2, batch_size=16)])
def test_scores_under_distortions_are_those_of_one_head(probe):
    data, encoder, seed = blobs(96), small_encoder(), Seed(5)
    train, test = data.subset(torch.arange(64)), data.subset(torch.arange(64, 96))
    trigger, jpeg = Patch(size=5), Jpeg(quality=10)
    hit, squeezed = triggered(test, trigger, seed), triggered(test, jpeg.trigger(None), seed)
    both = triggered(test, jpeg.trigger(trigger), seed)
    moved = triggered(test, Shift(pixels=3).trigger(trigger), seed)
    distorted = {"jpeg_10": (squeezed, both), "shift_3": (None, moved)}
    found = score(encoder, train, test, hit, 1, probe, 2, seed, distorted=distorted)["counts"]
    assert set(found) - set(score(encoder, train, test, hit, 1, probe, 2, seed)["counts"]) == {
        "accuracy@jpeg_10", "attack_success_rate@jpeg_10", "attack_success_rate@shift_3",
    }  # fmt: skip
    for i in range(2):
        classifier = probe.fit(encoder, train, seed.child("head", i))
        with torch.no_grad():
            says = {
                name: classifier.head(features(classifier.encoder, one)).argmax(1)
                for name, one in (("plain", squeezed), ("hit", both), ("moved", moved))
            }
        others = test.labels != 1
        assert found["accuracy@jpeg_10"][i] == (int((says["plain"] == test.labels).sum()), 32)
        assert found["attack_success_rate@jpeg_10"][i] == (int((says["hit"] == 1)[others].sum()), int(others.sum()))
        assert found["attack_success_rate@shift_3"][i] == (int((says["moved"] == 1)[others].sum()), int(others.sum()))


def test_a_row_whose_file_is_not_here_is_skipped_with_the_reason(tmp_path):
    missing = tiny(attacker={"references": {"file": "nowhere/reference.npz"}})
    record, arrays = run_cell(cells(missing, "t")[0][1], Store(tmp_path))
    assert (record.status, arrays) == ("skipped", {})
    assert "nowhere/reference.npz" in record.reason
    (alone,) = run_cells(cells(missing, "t"), tmp_path)
    assert alone.status == "failed", "nothing was done at all"
    assert Record.read(tmp_path / "cells" / "tiny.json").status == "failed"


@pytest.mark.full
def test_the_other_rows_go_on_and_records_know_their_place(tmp_path):
    grid = {"row": {"here": {}, "missing": {"attacker.references.file": "nowhere/reference.npz"}}}
    plain = tiny(grid=grid)
    plain["downstream"]["distortions"] = DISTORTIONS
    here, missing = run_cells(cells(plain, "t"), tmp_path)
    assert (here.status, missing.status) == ("done", "skipped"), here.reason
    assert [one.extra["grid"] for one in (here, missing)] == [{"row": "here"}, {"row": "missing"}]
    names = {
        "clean_accuracy_jpeg_50", "backdoored_accuracy_jpeg_50", "attack_success_rate_baseline_jpeg_50",
        "attack_success_rate_jpeg_50", "attack_success_rate_baseline_shift_2", "attack_success_rate_shift_2",
    }  # fmt: skip
    assert names <= set(here.metrics)
    assert "clean_accuracy_shift_2" not in here.metrics
    assert json.loads((tmp_path / "cells" / "tiny--row=missing.json").read_text())["reason"]
