"""Experiments: the file, the grid, keys, the store, and a whole run that is resumed."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

import experiments
from cupel import progress
from cupel.errors import CupelError, DataError, Interrupted, SettingsError
from cupel.experiment import Store, cells, plan, read_experiment, run_cells
from cupel.experiment.store import Artefact
from cupel.records import Record

TINY = {
    **experiments.TINY,
    "attack": {**experiments.TINY["attack"], "lr": 0.05},
    "downstream": {"data": "digits", "target_class": 1, "head_seeds": 3},
    "scan": [{"method": "decree", "steps": 4, "batch_size": 8, "num_seeds": 2}],
    "purify": [{"method": "cbd", "steps": 2, "batch_size": 8, "pgd_steps": 1}],
}


def one(**changes):
    plain = copy.deepcopy(TINY)
    for path, value in changes.items():
        here = plain
        *parts, last = path.split("__")
        for part in parts:
            here = here[part]
        here[last] = value
    return cells(plain, "tiny.yaml")


def keys(experiment) -> dict[str, str]:
    return {step.name: step.key for step in plan(experiment)}


def test_every_attacked_run_has_its_clean_twin():
    names = list(keys(one()[0][1]))
    assert names.index("pretrain clean") < names.index("implant badencoder")
    assert {"scan decree: clean", "scan decree: backdoored", "scan decree: purified"} <= set(names)
    assert {"score digits: clean", "score digits: backdoored", "score digits: purified"} <= set(names)


def test_changing_the_attack_keeps_the_pre_training():
    a, b = keys(one()[0][1]), keys(one(attack__lr=0.1)[0][1])
    assert a["pretrain clean"] == b["pretrain clean"]
    assert a["scan decree: clean"] == b["scan decree: clean"]
    assert a["implant badencoder"] != b["implant badencoder"]
    assert a["purify cbd"] != b["purify cbd"]


def test_the_seed_changes_every_key():
    a, b = keys(one()[0][1]), keys(one(seed=1)[0][1])
    assert not {k for k in a if a[k] == b[k]}


def test_keys_are_stable_over_processes(tmp_path):
    import subprocess
    import sys

    code = (
        "import json,sys; from cupel.experiment import cells, plan; "
        "print(json.dumps({s.name: s.key for s in plan(cells(json.load(sys.stdin), 'x')[0][1])}))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(TINY), capture_output=True, text=True, check=True
    )
    assert json.loads(made.stdout) == keys(one()[0][1])


def test_grid_is_cartesian_and_lists_stay_lists():
    found = one(grid={"attack.trigger.size": [4, 6], "seed": [0, 1, 2]})
    assert [(p["attack.trigger.size"], e.seed, e.attack.trigger.size) for p, e in found] == [
        (a, s, a) for a in (4, 6) for s in (0, 1, 2)
    ]
    assert len({keys(e)["pretrain clean"] for _, e in found}) == 3


def test_set_changes_a_key_and_a_bare_method_gets_room():
    changed = cells(TINY, "t", ["attack.lr=1e-3", "upstream.encoder.width=4", "seed=5"])[0][1]
    assert (changed.attack.lr, changed.upstream.encoder.width, changed.seed) == (0.001, 4, 5)
    bare = cells({**TINY, "downstream": {"data": "digits", "target_class": 1, "probe": "linear"}}, "t",
                 ["downstream.probe.l2=0.5"])[0][1]  # fmt: skip
    assert bare.downstream[0].probe.l2 == 0.5


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["sed=1"], "unknown key 'sed'"),
        (["attack.lamda_utility=1"], "did you mean 'lambda_utility'"),
        (["attack.method=badencodr"], "unknown method 'badencodr'"),
        (["seed"], "has no '='"),
        (["seed=1.5"], "expected int, got 1.5"),
        (["seed=yes"], "expected int, got 'yes'"),
        (["name.x=1"], "name"),
    ],
)
def test_wrong_changes(changes, line):
    with pytest.raises(SettingsError, match=line) as caught:
        cells(TINY, "t.yaml", changes)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("name: a\nname: b\n", r"e\.yaml:2:1.*duplicate key 'name'"),
        ("a: !!python/object/apply:os.system ['x']\n", r"e\.yaml:1"),
        ("[1, 2", r"e\.yaml:1"),
        ("- 1\n- 2\n", "holds no mapping"),
        ("a: " + "[" * 100 + "]" * 100, "nested|deep"),
        ("x: " + "a" * (2**20 + 1), "larger than 1 MiB"),
        ("\x00", "not valid YAML"),
    ],
)
def test_files_that_are_no_experiment(tmp_path, text, match):
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=match) as caught:
        read_experiment(path)
    assert "\n" not in str(caught.value)


def test_alias_bomb_is_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "e.yaml").write_text("\n".join(lines))
    with pytest.raises(SettingsError):
        read_experiment(tmp_path / "e.yaml")


def test_numbers_and_words_as_yaml_1_2_has_them(tmp_path):
    (tmp_path / "e.yaml").write_text("a: 1e-3\nb: no\nc: 1_000\nd: true\ne: -2.5E+3\nf: 010\n")
    data, _ = read_experiment(tmp_path / "e.yaml")
    assert data["a"] == 0.001
    assert data["b"] == "no"
    assert data["d"] is True
    assert data["e"] == -2500.0


def test_no_such_file_suggests_packaged_ones():
    with pytest.raises(DataError, match="did you mean 'demo-digits'"):
        read_experiment("demo-digit")


def test_target_class_out_of_range_is_a_failed_record(tmp_path):
    (record,) = run_cells(one(downstream__target_class=10), tmp_path)
    assert record.status == "failed"
    assert "10" in record.reason
    assert record.extra["exit_code"] == 4


def test_trigger_larger_than_the_image(tmp_path):
    (record,) = run_cells(one(attack__trigger={"method": "patch", "size": 40}), tmp_path)
    assert record.status == "failed"
    assert "40" in record.reason
    assert "16" in record.reason


def test_store_is_whole_or_not_at_all(tmp_path):
    store = Store(tmp_path)
    store.save("scan", "k", Artefact({"a": 1}, {"curve/x": np.arange(3.0)}))
    again = store.find("scan", "k")
    assert again.values == {"a": 1}
    assert again.arrays["curve/x"].tolist() == [0.0, 1.0, 2.0]
    assert not list(tmp_path.rglob("*.part"))
    (tmp_path / "scan" / "k" / "arrays.npz").write_bytes(b"half")
    assert store.find("scan", "k") is None
    assert not (tmp_path / "scan" / "k").exists()


def test_nan_never_enters_a_record(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Store(tmp_path).save("scan", "k", Artefact({"a": float("nan")}))
    assert Store(tmp_path).find("scan", "k") is None


@pytest.mark.full
def test_a_run_end_to_end_and_again(tmp_path):
    (record,) = run_cells(one(), tmp_path)
    assert record.status == "done", record.reason
    assert {
        "clean_accuracy", "backdoored_accuracy", "attack_success_rate", "attack_success_rate_baseline",
        "attack_success_rate_all", "robust_accuracy", "purified_accuracy", "purified_attack_success_rate",
    } <= set(record.metrics)  # fmt: skip
    assert record.metrics["attack_success_rate"].n == 324
    assert record.metrics["attack_success_rate_all"].n == 360
    assert set(record.verdicts) == {"clean", "backdoored", "purified"}
    assert record.extra["manifest"]["not_for_deployment"] is True
    assert record.notes[0] == "The attacker's shadow images are pre-training images."
    read = Record.read(tmp_path / "cells" / "tiny.json")
    assert read.metrics == record.metrics
    (again,) = run_cells(one(), tmp_path)
    assert all(step["cached"] for step in again.steps)
    assert again.metrics == record.metrics
    assert again.verdicts == record.verdicts


@pytest.mark.full
def test_interrupted_run_goes_on_to_the_same_result(tmp_path, monkeypatch):
    (whole,) = run_cells(one(), tmp_path / "a")
    from cupel.experiment import run as module

    real, done = module.STAGES["implant"], []

    def stop_once(*arguments):
        if not done:
            done.append(1)
            progress.request_stop(15)
            progress.stop_if_requested()
        return real(*arguments)

    monkeypatch.setattr(module, "STAGES", {**module.STAGES, "implant": stop_once})
    try:
        with pytest.raises(Interrupted) as caught:
            run_cells(one(), tmp_path / "b")
    finally:
        progress.request_stop(None)
    assert caught.value.exit_code == 143
    (resumed,) = run_cells(one(), tmp_path / "b")
    assert resumed.metrics == whole.metrics
    assert [s["cached"] for s in resumed.steps if s["stage"] == "pretrain"] == [True]


@pytest.mark.full
def test_data_attack_goes_through_pre_training(tmp_path):
    attack = {"method": "ssl_backdoor", "trigger": {"method": "random_patch", "size": 4}}
    found = one(attack=attack, purify=[], scan=[])
    (record,) = run_cells(found, tmp_path)
    assert record.status == "done", record.reason
    assert [s["method"] for s in record.steps if s["stage"] == "pretrain"] == ["pretrain clean", "pretrain backdoored"]
    assert {"attack_success_rate", "attack_success_rate_baseline"} <= set(record.metrics)
    encoders = list((tmp_path / "store" / "pretrain").glob("*/backdoor_manifest.json"))
    assert len(encoders) == 1
    manifest = json.loads(encoders[0].read_text())
    assert manifest["attack"] == "ssl_backdoor"
    assert manifest["num_poisoned"] > 0


@pytest.mark.full
def test_two_tasks_and_two_targets_in_one_encoder(tmp_path):
    tasks = [
        {"data": "digits", "target_class": 1, "head_seeds": 1, "references": {"size": 2}},
        {
            "data": "digits",
            "target_class": 3,
            "head_seeds": 1,
            "trigger": {"method": "patch", "size": 4, "corner": "top_left"},
        },
    ]
    (record,) = run_cells(one(downstream=tasks, purify=[], scan=[]), tmp_path)
    assert record.status == "done", record.reason
    assert {"digits-1/attack_success_rate", "digits-3/attack_success_rate"} <= set(record.metrics)
    triggers = [goal["trigger"] for goal in record.extra["manifest"]["goals"]]
    assert [t["corner"] for t in triggers] == ["bottom_right", "top_left"]


def test_label_free_methods_never_see_labels():
    from cupel import data
    from cupel.errors import LabelsWithheld

    images = data.load("digits", size=16).subset(torch.arange(40)).without_labels("decree")
    with pytest.raises(LabelsWithheld, match="labels are withheld from decree"):
        _ = images.labels
    assert (images.labels_ == -1).all()
    assert issubclass(LabelsWithheld, CupelError)


def test_a_folder_does_not_hide_a_packaged_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "badencoder-lambdas").mkdir()
    (tmp_path / "mine").mkdir()
    assert read_experiment("badencoder-lambdas")[0]["name"] == "badencoder-lambdas"
    with pytest.raises(DataError, match="is a folder"):
        read_experiment("mine")
