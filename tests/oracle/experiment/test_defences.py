"""Defences in an experiment: labels, references, filters, old and own heads, certificates, retuning, costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import experiments
from cupel.cost import counting
from cupel.errors import SettingsError
from cupel.experiment import Store, plan, run_cells, stages
from cupel.experiment.defending import own_head
from cupel.experiment.store import Artefact
from cupel.records import Record

TINY: dict[str, Any] = {
    **experiments.TINY,
    "defender": {"size": 64, "labelled": 80},
}
POISONS = {"attack": {"method": "badnets", "trigger": {"method": "patch", "size": 5}}}


def experiment(**changes: Any) -> Any:
    return experiments.tiny_cells(TINY, **changes)


def ran(tmp_path: Path, **changes: Any) -> Record:
    (record,) = run_cells(experiment(**changes), tmp_path)
    assert record.status == "done", record.reason
    return record


def steps(**changes: Any) -> dict[str, Any]:
    return experiments.planned(TINY, **changes)


def test_labelled_and_label_free_purifiers_see_their_own_images() -> None:
    found = steps(purify=[{"method": "cbd"}, {"method": "ft"}], scan=[{"method": "decree"}])
    assert [one.name for one in found["purify cbd"].inputs[1:]] == [
        "defender images of digits",
        "scan decree: backdoored",
    ]
    assert [one.name for one in found["purify ft"].inputs[1:]] == [
        "labelled images of digits",
        "train images of digits",
        "scan decree: backdoored",
    ]
    assert found["purify ft"].inputs[1].method["limit"] == 80


def test_without_a_number_all_training_images_are_labelled() -> None:
    found = steps(purify=["ft"], defender={"size": 64})
    assert found["purify ft"].inputs[1].name == "train images of digits"


def test_variants_of_one_scanner_have_names_of_their_own() -> None:
    found = steps(
        scan=[{"method": "decree"}, {"method": "decree", "variant": "linf"}, {"method": "decree", "steps": 9}]
    )
    wanted = {"scan decree-1: clean", "scan decree-linf: clean", "scan decree-2: clean"}
    assert wanted <= set(found)
    assert len({found[name].key for name in wanted}) == 3


def test_a_purifier_of_the_training_set_needs_poison() -> None:
    with pytest.raises(SettingsError, match="abl works on the poisoned training set, but the attack poisons none"):
        steps(purify=["abl"])
    supervised = {"method": "supervised", "steps": 8, "batch_size": 64}
    changes = {"upstream": {**TINY["upstream"], "objective": supervised}, **POISONS, "purify": ["abl"]}
    assert steps(**changes)["purify abl"].inputs[1].stage == "poison"


@pytest.mark.full
def test_two_purifiers_with_heads_costs_and_retuning(tmp_path: Path) -> None:
    task = {"data": "digits", "target_class": 1, "head_seeds": 2, "retuning": {"seeds": 1, "tuning": {"steps": 2}}}
    purify = [{"method": "clp"}, {"method": "ft", "steps": 2, "batch_size": 32}]
    record = ran(tmp_path, downstream=task, purify=purify)
    names = set(record.metrics)
    for which in ("purified", "purified_2"):
        for kind in ("accuracy", "attack_success_rate", "robust_accuracy"):
            assert f"{which}_{kind}" in names
            assert f"{which}_{kind}_old_head" in names
            assert (f"{which}_{kind}_own_head" in names) == (which == "purified_2")
    assert {"retuned_attack_success_rate_baseline", "retuned_accuracy_baseline"} <= names
    assert {"retuned_attack_success_rate", "purified_2_retuned_accuracy"} <= names
    assert not any(name.startswith("backdoored_retuned") for name in names)
    costs = record.extra["defences"]["purify ft"]
    assert costs["images"] == 80
    assert costs["backward_images"] >= 2 * 32
    assert record.extra["defences"]["purify clp"]["backward_images"] == 0
    companions = record.extra["companions"]["score digits: purified-2"]
    assert 0.5 < companions["clean_to_given_cosine"] <= 1
    assert companions["clean_to_given_cosine"] != companions["clean_to_twin_cosine"]


def test_an_encoder_that_nothing_changed_keeps_its_old_head(tmp_path: Path) -> None:
    record = ran(tmp_path, purify=[{"method": "clp", "u": 1000.0}])
    for kind in ("accuracy", "attack_success_rate"):
        assert record.metrics[f"purified_{kind}_old_head"] == record.metrics[f"purified_{kind}"]
    companions = record.extra["companions"]["score digits: purified"]
    assert companions["clean_to_given_cosine"] == pytest.approx(1, abs=1e-5)


@pytest.mark.full
def test_meta_classifiers_get_a_reference_of_their_own(tmp_path: Path) -> None:
    small = {"shadows": 16, "steps": 2, "batch_size": 16, "images": 64, "epochs": 1, "repeats": 1}
    scans = [{"method": "mntd", "width": 4, **small}, {"method": "mntd_encoder", **small}]
    found = steps(scan=scans)
    base = found["train mntd_encoder"].inputs[1]
    assert base.name == "pretrain public"
    assert base.key != found["pretrain clean"].key
    assert base.inputs == found["pretrain clean"].inputs
    assert found["scan mntd: clean"].inputs[1].name == "labelled images of digits"
    record = ran(tmp_path, scan=scans)
    assert set(record.extra["scans"]) == {"clean", "backdoored"}
    each = record.extra["scans"]["clean"]
    assert set(each) == {"mntd", "mntd_encoder"}
    assert all({"verdict", "score", "peak_memory_mib"} <= set(one) for one in each.values())


@pytest.mark.full
def test_a_filter_makes_an_encoder_of_what_it_left(tmp_path: Path) -> None:
    record = ran(tmp_path, **POISONS, filter=[{"method": "patchsearch", "clusters": 4}])
    counts = record.extra["defences"]["filter patchsearch"]
    assert 300 < counts["images"] <= 400  # without the digits held out as references
    assert 0 <= counts["poisoned_removed"] <= min(counts["poisoned"], counts["removed"])
    assert "filtered_accuracy" in record.metrics
    made = next(s for s in plan(experiment(**POISONS, filter=[{"method": "patchsearch", "clusters": 4}])[0][1])
                if s.name == "pretrain filtered")  # fmt: skip
    stored = Store(tmp_path / "store").find("pretrain", made.key)
    assert stored is not None
    assert stored.encoder.card.manifest["num_poisoned"] == counts["poisoned"] - counts["poisoned_removed"]


@pytest.mark.full
def test_certified_accuracy_is_in_the_record(tmp_path: Path) -> None:
    task = {"data": "digits", "target_class": 1, "head_seeds": 1, "test_size": 60}
    record = ran(tmp_path, downstream=task, certify=[{"method": "mask_ds", "patch": 2}])
    for which in ("clean", "backdoored"):
        right = record.metrics[f"mask_ds_{which}_clean_accuracy"]
        sure = record.metrics[f"mask_ds_{which}_certified_accuracy"]
        assert 0 <= sure.value <= right.value <= 1
        assert f"mask_ds_{which}_attack_success_rate" in record.metrics


def test_costs_count_images_not_passes() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3), nn.Conv2d(3, 2, 1, bias=False))
    with counting() as cost:
        network[0](torch.zeros(5, 3, 8, 8))
        with torch.no_grad():
            network[0](torch.zeros(7, 3, 8, 8))
    network[0](torch.zeros(2, 3, 8, 8))
    assert (cost.forward, cost.backward) == (12, 5)


def test_own_head_comes_back_as_it_was() -> None:
    head = nn.Linear(4, 3)
    arrays = {f"head/{k}": v.detach().numpy() for k, v in head.state_dict().items()}
    made = own_head(Artefact({}, arrays))
    x = torch.randn(6, 4)
    assert made is not None
    assert torch.equal(made(x), head(x))
    assert own_head(Artefact({}, {})) is None


def test_pictures_are_those_of_the_scan_that_counts():
    def made(word, value):
        arrays = {f"inverted/0/{part}": np.array(value) for part in ("mask", "pattern", "path")}
        return Artefact({"verdict": {"verdict": word}}, arrays)

    scans = [
        ("clean", "decree", made("clean-by-test", 1)), ("clean", "pscan", made("clean-by-test", 2)),
        ("backdoored", "decree", made("suspicious", 3)), ("backdoored", "pscan", made("backdoored", 4)),
    ]  # fmt: skip
    found = stages._triggers(scans)
    assert {name: int(value) for name, value in found.items() if not name.endswith("pattern")} == {
        "inverted/clean/0/mask": 1, "inverted/clean/0/path": 1, "scans/clean/pscan/0/path": 2,
        "inverted/backdoored/0/mask": 4, "inverted/backdoored/0/path": 4, "scans/backdoored/decree/0/path": 3,
    }  # fmt: skip
