"""What purifiers are handed when it is bad: triggered images among the defender's, other data; the clean twin too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import experiments
from cupel.errors import DataError, SettingsError
from cupel.experiment import run_cells
from cupel.experiment.stages import STAGES, Context
from cupel.experiment.store import Artefact
from cupel.report import load_cells, render_report, render_table
from cupel.seeds import Seed
from cupel.triggers import Patch

TINY: dict[str, Any] = {
    **experiments.TINY,
    "defender": {"size": 60},
    "purify": [{"method": "cupellation", "steps": 2, "batch_size": 16}],
}


def experiment(**changes: Any) -> Any:
    return experiments.tiny_cells(TINY, **changes)


def steps(**changes: Any) -> dict[str, Any]:
    return experiments.planned(TINY, **changes)


def keys(**changes: Any) -> dict[str, str]:
    return {name: step.key for name, step in steps(**changes).items()}


def handed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """The record of a run, and the value of each step's inputs."""
    seen: dict[str, Any] = {}

    def watch(given: Any) -> Any:
        def call(step: Any, inputs: Any, context: Any) -> Any:
            seen[step.name] = list(inputs)
            return given(step, inputs, context)

        return call

    table: Any = STAGES
    for name in ("purify", "stamp"):
        monkeypatch.setitem(table, name, watch(STAGES[name]))
    (record,) = run_cells(experiment(**changes), tmp_path)
    assert record.status == "done", record.reason
    return record, seen


def test_defaults_change_no_key() -> None:
    """The keys of the plan as it was before these settings came."""
    plain = keys()
    assert plain == keys(defender={"size": 60, "triggered": 0.0}, purify_clean=False)
    assert "some of the defender's images" not in plain


def test_triggered_images_change_what_is_made_of_them_alone() -> None:
    plain, more = keys(), keys(defender={"size": 60, "triggered": 0.1})
    assert {name for name in plain if plain[name] != more[name]} == {
        "purify cupellation", "score digits: purified", "describe"
    }  # fmt: skip
    assert keys(defender={"size": 60, "triggered": 0.2})["purify cupellation"] != more["purify cupellation"]


def test_purifying_the_clean_twin_adds_and_changes_nothing() -> None:
    plain, more = keys(), keys(purify_clean=True)
    assert set(more) - set(plain) == {"purify cupellation: clean-purified", "score digits: clean-purified"}
    assert {name for name in plain if plain[name] != more[name]} == {"describe"}
    found = steps(purify_clean=True, scan=[{"method": "decree"}])
    twin, attacked = found["purify cupellation: clean-purified"], found["purify cupellation"]
    assert twin.seed == attacked.seed
    assert [one.name for one in twin.inputs] == [
        "pretrain clean", "defender images of digits", "scan decree: clean"
    ]  # fmt: skip
    assert [one.name for one in attacked.inputs[2:]] == ["scan decree: backdoored"]
    assert [one.name for one in found["score digits: clean-purified"].inputs[4:]] == ["pretrain clean"] * 2


def test_a_labelled_purifier_of_the_twin_sees_no_poison() -> None:
    supervised = {**TINY["upstream"], "objective": {"method": "supervised", "steps": 8, "batch_size": 64}}
    attack = {"method": "badnets", "trigger": {"method": "patch", "size": 5}}
    task = {"data": "digits", "target_class": 1, "on_training_data": True}
    found = steps(upstream=supervised, attack=attack, downstream=task, purify=["abl"], purify_clean=True)
    assert [one.stage for one in found["purify abl"].inputs] == ["pretrain", "poison", "poison"]
    assert [one.name for one in found["purify abl: clean-purified"].inputs] == [
        "pretrain clean", "pre-training images of digits", "pre-training images of digits"
    ]  # fmt: skip
    assert found["score digits: clean-purified"].inputs[1].name == "pre-training images of digits"


def test_without_an_attack() -> None:
    found = steps(attack=None, purify_clean=True)
    assert "score digits: clean-purified" in found
    assert "purify cupellation" not in found
    with pytest.raises(SettingsError, match=r"tiny\.defender\.triggered: there is no attack"):
        steps(attack=None, defender={"triggered": 0.1})


def test_an_attack_without_a_trigger_is_told() -> None:
    step = steps(defender={"size": 60, "triggered": 0.1})["purify cupellation"].inputs[1]
    images = STAGES["data"](step.inputs[0], [], Context("cpu", None))
    with pytest.raises(DataError, match="no trigger that images could bear"):
        STAGES["stamp"](step, [images, Artefact({"goals": []})], Context("cpu", None))


def test_the_share_of_triggered_images_and_the_twin_in_record_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {**TINY["downstream"], "distortions": [{"method": "jpeg", "quality": 50}]}
    defender = {"size": 60, "triggered": 0.1}
    record, seen = handed(monkeypatch, tmp_path, defender=defender, purify_clean=True, downstream=task)
    plain = seen["some of the defender's images"][0]
    given = seen["purify cupellation"][1]
    assert given is seen["purify cupellation: clean-purified"][1]
    other = (given.inputs != plain.inputs).flatten(1).any(1)
    stamped = torch.as_tensor(Patch(size=5)(plain.inputs, plain.ids.tolist(), Seed(0)))  # a patch draws nothing
    assert (given.inputs == stamped).flatten(1).all(1)[other].all()
    whole = (given.inputs == stamped).flatten(1).all(1)
    assert other.sum() <= 6 <= whole.sum()
    assert other.sum() >= 5  # a digit may be white there already
    assert torch.equal(given.ids, plain.ids)
    assert record.extra["defences"]["purify cupellation"]["triggered_images"] == 6
    assert "10.0% of the defender's unlabelled images bear the attack's trigger." in record.notes
    for kind in ("accuracy", "attack_success_rate", "robust_accuracy", "accuracy_old_head", "accuracy_jpeg_50"):
        assert f"clean_purified_{kind}" in record.metrics
    assert record.metrics["clean_purified_accuracy"].n == record.metrics["clean_accuracy"].n
    companions = record.extra["companions"]["score digits: clean-purified"]
    assert companions["clean_to_given_cosine"] == companions["clean_to_twin_cosine"] < 1
    found = load_cells(tmp_path)
    assert "map/clean-purified/points" in found[0][1]
    text, page = render_table([record]), render_report(found)
    assert text.splitlines()[0].index("CA %") < text.splitlines()[0].index("purified CA %")
    assert "purified CA − CA" in text
    assert "purified CA" in render_table([record], "md")
    assert "The clean twin, purified as well, is right on" in page


def test_without_triggered_images_nothing_is_said(tmp_path: Path) -> None:
    (record,) = run_cells(experiment(), tmp_path)
    assert "triggered_images" not in record.extra["defences"]["purify cupellation"]
    assert not any("trigger" in note for note in record.notes)


def test_triggers_of_one_attack_take_turns() -> None:
    """Each of the images that bear one bears one of its own turn."""
    step = steps(defender={"size": 60, "triggered": 0.2})["purify cupellation"].inputs[1]
    images = STAGES["data"](step.inputs[0], [], Context("cpu", None))
    corners = [{"method": "patch", "size": 5, "corner": one, "color": "red"} for one in ("top_left", "bottom_right")]

    two = Artefact({"goals": [{"trigger": one, "task": None, "target_class": None} for one in corners]})
    made = STAGES["stamp"](step, [images, two], Context("cpu", None))
    other = (made.inputs != images.inputs).any(1)  # digits are grey: red always shows
    assert int(other[:, :8, :8].flatten(1).any(1).sum()) == int(other[:, 8:, 8:].flatten(1).any(1).sum()) == 6
    assert int(other.flatten(1).any(1).sum()) == 12
