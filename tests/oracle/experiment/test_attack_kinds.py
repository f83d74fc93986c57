"""Attacks that know their target in other ways: checked goals, teachers with fewer classes, classes found later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cupel import metrics
from cupel.attack.badencoder import BadEncoder
from cupel.attack.drupe import DRUPE
from cupel.distort import Shift
from cupel.errors import DataError, SettingsError, UsageError
from cupel.experiment import cells, plan, run_cells
from cupel.experiment.attacking import judge
from cupel.experiment.images import images_of
from cupel.experiment.judging import mistaken, others
from cupel.experiment.landing import score_found
from cupel.experiment.store import Artefact
from cupel.inference import features, triggered
from cupel.probe import FineTune, Linear
from cupel.seeds import Seed
from cupel.triggers import Patch
from cupel.types import Goal, Knowledge
from toys import blobs, small_encoder, trained_encoder

PATCH = {"method": "patch", "size": 4}
TASK = {"data": "digits", "target_class": 1, "head_seeds": 2, "size": 300, "test_size": 80}
UPSTREAM = {
    "data": "digits", "size": 400, "encoder": {"method": "fast", "input_size": 16, "width": 4},
    "objective": {"method": "simclr", "steps": 2, "batch_size": 32},
}  # fmt: skip
SHORT: dict[str, Any] = {"steps": 2, "batch_size": 32}
TEACHER = {"shadow": {"classes": [0, 1, 2]}, "references": {"size": 4}}


def tiny(attack: Any, downstream: Any = TASK, **more: Any) -> Any:
    return cells(
        copy.deepcopy({"name": "t", "upstream": UPSTREAM, "attack": attack, "downstream": downstream, **more}), "t"
    )


def planned(*args: Any, **more: Any) -> Any:
    return plan(tiny(*args, **more)[0][1])


def task(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**TASK, **changes}.items() if value is not None}


# --- goals ---

BAD = {"method": "badencoder", "trigger": PATCH, **SHORT}


@pytest.mark.parametrize(
    ("attack", "downstream", "more", "match"),
    [
        (
            BAD,
            [task(), task(target_class=2)],
            {},
            r"t\.downstream: one trigger shall lead to classes 1 and 2 of dig",
        ),
        (BAD, task(target_class=None), {}, r"names no target class for digits; add `target_class"),
        ("neuba", task(), {}, r"where a trigger of neuba leads shows only in the task; leave `target_class` out"),
        ("latent_backdoor", task(), {}, r"shadow: latent_backdoor needs a teacher without the target"),
        ("latent_backdoor", task(), {"attacker": TEACHER}, r"its images of digits show class 1"),
        ("trojannn_model", task(), {"attacker": TEACHER}, r"set `data: digits` without `classes`"),
        ("trojannn_model", task(), {"attacker": {"shadow": {"data": "shapes"}}}, r"these are not those of digits"),
    ],
)
def test_goals_that_cannot_be(attack: Any, downstream: Any, more: Any, match: str) -> None:
    with pytest.raises(SettingsError, match=match) as caught:
        planned(attack, downstream, **more)
    assert "\n" not in str(caught.value)


def test_goals_that_can_be() -> None:
    """Two targets with a trigger each; one trigger for two tasks; patterns learned at one place."""
    other = {"method": "patch", "size": 4, "corner": "top_left"}
    planned(BAD, [task(), task(target_class=2, trigger=other)])
    planned(BAD, [task(), task(data="shapes", target_class=2)])
    planned("trojannn_model", [task(), task(target_class=2)])
    planned("latent_backdoor", task(target_class=5), attacker=TEACHER)
    planned("latent_backdoor", task(), attacker={"shadow": {"data": "shapes"}})


@pytest.mark.parametrize("where", ["attack", "downstream"])
def test_a_trigger_outside_of_the_image_is_told_before_any_training(where: str) -> None:
    large = {"method": "patch", "size": 4, "margin": 14}
    with pytest.raises(UsageError, match="16") as caught:
        planned({**BAD, "trigger": large}) if where == "attack" else planned(BAD, task(trigger=large))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attack", [BadEncoder(steps=2, batch_size=16), DRUPE(steps=2, batch_size=16)])
def test_contradicting_goals_of_python_callers(attack: Any) -> None:
    data = blobs(32)
    goals = tuple(Goal(Patch(size=4), data.inputs[:1], "blobs", target) for target in (1, 2))
    with pytest.raises(UsageError, match="one trigger shall lead to classes 1 and 2 of 'blobs'"):
        attack.implant(small_encoder(), Knowledge(goals, data.without_labels("a")), Seed(0))


@pytest.mark.parametrize(
    "make", [lambda n: BadEncoder(steps=2, batch_size=n), lambda n: DRUPE(steps=2, batch_size=n)], ids=["bad", "drupe"]
)
def test_a_shadow_set_smaller_than_a_batch(make: Callable[[int], Any]) -> None:
    data = blobs(16)
    goal = Goal(Patch(size=4), data.inputs[:1], "blobs", 1)
    with pytest.raises(DataError, match=r"has 16 images, one batch needs 17; lower `batch_size`"):
        make(17).implant(small_encoder(), Knowledge((goal,), data.without_labels("a")), Seed(0))


# --- a teacher of some classes ---


def shadow(**values: Any) -> Any:
    method = {"role": "shadow", "source": "digits", "size": 16, "limit": None, "without": [], "within": None, **values}
    return images_of(method, Seed(0))


def test_shadow_of_some_classes_is_numbered_anew() -> None:
    whole, some = shadow(), shadow(classes=[7, 2])
    kept = [i for i, one in enumerate(whole.labels.tolist()) if one in (7, 2)]
    assert torch.equal(some.inputs[torch.arange(len(some))], whole.inputs[torch.tensor(kept)])
    assert some.labels.tolist() == [[7, 2].index(one) for one in whole.labels[torch.tensor(kept)].tolist()]
    assert (some.num_classes, some.classes) == (2, (whole.classes[7], whole.classes[2]))
    assert len(shadow(classes=[7, 2], limit=20)) == 20
    with pytest.raises(UsageError, match="target class 10 is not one of its 10 classes"):
        shadow(classes=[10])


def test_fewer_classes_change_the_keys_of_the_attack_alone() -> None:
    a, b = ({s.name: s.key for s in planned(BAD, attacker=one)} for one in ({}, {"shadow": {"classes": [1, 2]}}))
    assert a["pretrain clean"] == b["pretrain clean"]
    assert a["references digits"] == b["references digits"]
    assert a["implant badencoder"] != b["implant badencoder"]


# --- references that the clean pipeline takes for something else ---


def test_references_are_judged_by_a_probe_on_the_clean_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six references, three of them of another class: exactly these are told."""
    data = blobs(256)
    encoder = trained_encoder(data)
    rows = torch.cat([(data.labels == c).nonzero().flatten()[:3] for c in (1, 2)])
    steps = planned(BAD)
    step = next(s for s in steps if s.stage == "judge")
    assert step.inputs[0].method["target_class"] == 1
    pictures = Artefact({}, {"references": data.inputs[rows].numpy()})
    said: list[str] = []
    monkeypatch.setattr("cupel.experiment.attacking.say", said.append)
    found = dict(judge(step, [pictures, Artefact(encoder=encoder), data], None).values)
    assert len(said) == 1
    assert said[0].startswith("  warning: The clean pipeline takes 3 of 6 reference(s)")
    assert found["seen_as"] == [1, 1, 1, 2, 2, 2]
    assert others(found) == ["c"]
    line = mistaken("blobs", found)
    assert line.startswith("The clean pipeline takes 3 of 6 reference(s) of blobs for c, not for the target b")
    right = {**found, "seen_as": [1, 1]}
    assert others(right) == []


# --- classes that are found later ---


def added(a: metrics.Count, b: metrics.Count) -> metrics.Count:
    return a[0] + b[0], a[1] + b[1]


@pytest.mark.parametrize("probe", [Linear(), FineTune(steps=3, batch_size=32)])
def test_scores_of_found_classes_by_hand(probe: Any) -> None:
    data = blobs(160)
    train, test, encoder, seed = (
        data.subset(torch.arange(100)),
        data.subset(torch.arange(100, 160)),
        small_encoder(),
        Seed(4),
    )
    goals = (Goal(Patch(size=6)), Goal(Patch(size=6, corner="top_left")))
    found = score_found(encoder, train, test, goals, probe, 2, seed, [Shift(pixels=2)])
    heads = [probe.fit(encoder, train, seed.child("head", i)) for i in range(2)]

    def says(trigger: Any, images: Any) -> list[Any]:
        with torch.no_grad():
            made = triggered(images, trigger, seed)
            return [one.head(features(one.encoder, made, store=False)).argmax(1) for one in heads]

    classes, shares, hits = [], [], []
    for goal in goals:
        votes = np.concatenate([one.numpy() for one in says(goal.trigger, train)])
        classes.append(int(np.bincount(votes).argmax()))
        shares.append(float((votes == classes[-1]).mean()))
        hits.append([metrics.attack_success_rate(one, test.labels, classes[-1]) for one in says(goal.trigger, test)])
    assert [(one["trigger"], one["target_class"]) for one in found["landings"]] == [(1, classes[0]), (2, classes[1])]
    assert [one["share"] for one in found["landings"]] == pytest.approx(shares)
    best = int(np.argmax(shares))
    counts = found["counts"]
    assert counts["attack_success_rate@trigger_1"] == hits[0]
    assert counts["attack_success_rate@trigger_2"] == hits[1]
    assert counts["attack_success_rate@best"] == hits[best]
    assert counts["attack_success_rate"] == [
        tuple(map(sum, zip(a, b, strict=True))) for a, b in zip(*hits, strict=True)
    ]
    assert found["target_class"] == classes[best]
    moved = []
    for goal, target in zip(goals, classes, strict=True):
        after = says(Shift(pixels=2).trigger(goal.trigger), test)
        moved.append([metrics.attack_success_rate(one, test.labels, target) for one in after])
    assert counts["attack_success_rate@shift_2"] == [added(*pair) for pair in zip(*moved, strict=True)]
    assert "accuracy@shift_2" not in counts


# --- end to end ---

DRAWS = {**SHORT, "l1_draws": 2}
FILTER = {"filter_width": 4, "filter_training": SHORT}
ADAPT = {"adapt": {**SHORT, "optimizer": "adam"}, "trigger_steps": 2}
SMALL_PICTURES = {"picture_steps": [[2, 4.0, 4.0]], "pictures_per_class": 4, "precision": "fp32"}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "drupe": ({"method": "drupe", "trigger": PATCH, **DRAWS}, task(), {"attacker": {"references": {"size": 3}}}),
    "inactive": ({"method": "inactive", **DRAWS, **FILTER}, task(), {}),
    "latent_backdoor": (
        {"method": "latent_backdoor", "trigger": PATCH, **SHORT, **ADAPT}, task(target_class=5), {"attacker": TEACHER},
    ),
    "trojannn_model": ({"method": "trojannn_model", "trigger": PATCH, **SHORT, **SMALL_PICTURES}, task(), {}),
    "neuba": ({"method": "neuba", **SHORT}, task(target_class=None), {}),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", RUNS)
def test_an_attack_runs_end_to_end_and_again(name: str, tmp_path: Any) -> None:
    attack, downstream, more = RUNS[name]
    found = tiny(attack, downstream, **more)
    (record,) = run_cells(found, tmp_path)
    assert record.status == "done", record.reason
    rates = {"clean_accuracy", "backdoored_accuracy", "attack_success_rate", "attack_success_rate_baseline"}
    assert rates <= set(record.metrics)
    manifest = record.extra["manifest"]
    assert (manifest["attack"], len(manifest["goals"])) == (name, 6 if name == "neuba" else 1)
    learned = {"inactive": "learned_filter", "latent_backdoor": "sticker", "trojannn_model": "sticker"}
    kind = {"drupe": "patch", "neuba": "color_checker", **learned}[name]
    assert all(one["trigger"]["method"] == kind for one in manifest["goals"])
    assert len((tmp_path / "cells" / "t.json").read_text()) < 60_000, "learned pixels are told by their hash"
    if name == "neuba":
        assert {"attack_success_rate_best", "attack_success_rate_baseline_best"} <= set(record.metrics)
        landed = record.extra["companions"]["score digits: backdoored"]["landings"]
        best = max(landed, key=lambda one: one["share"])
        assert record.extra["downstream"] == [{"task": "digits", "target_class": best["target_class"]}]
    else:
        assert record.extra["downstream"][0]["target_class"] == downstream["target_class"]
    (again,) = run_cells(found, tmp_path)
    assert all(step["cached"] for step in again.steps)
    assert again.metrics == record.metrics


@pytest.mark.full
def test_what_is_scored_is_the_learned_trigger(tmp_path: Any) -> None:
    from cupel.encoders.storage import load_encoder
    from cupel.experiment.attacking import goals_of
    from cupel.experiment.run import Runner
    from cupel.experiment.store import Store

    attack, downstream, more = RUNS["trojannn_model"]
    ((_, experiment),) = tiny(attack, downstream, **more)
    runner, steps = Runner(Store(tmp_path), "cpu"), plan(experiment)
    step = next(s for s in steps if s.name == "score digits: backdoored")
    value = runner.value(step).values
    model, train, test, made = (runner.value(one) for one in step.inputs)
    (goal,) = goals_of(made)
    assert type(goal.trigger).__name__ == "Sticker"
    shown = goal.trigger.mask_and_pattern(16)
    assert int(shown[0].sum()) == 16
    assert len(torch.unique(shown[1][:, 12:, 12:])) > 10, "learned, not the white patch that marked its place"
    encoder = load_encoder(tmp_path / "implant" / step.inputs[0].key / "encoder.safetensors")
    head = Linear().fit_features(features(encoder, train), train.labels, train.num_classes, step.seed.child("head", 0))
    with torch.no_grad():
        said = head(features(encoder, triggered(test, goal.trigger, Seed(9)))).argmax(1)
    assert tuple(value["counts"]["attack_success_rate"][0]) == metrics.attack_success_rate(said, test.labels, 1)
    assert model.encoder.card.manifest["attack"] == "trojannn_model"
