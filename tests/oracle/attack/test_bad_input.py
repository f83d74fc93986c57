"""What an attacker may get wrong, for every attack on an encoder: one line that says it, before anything is trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from cupel.attack import ATTACKS
from cupel.errors import CupelError, DataError, UsageError
from cupel.experiment import cells, run_cells
from cupel.seeds import Seed
from cupel.triggers import Patch
from cupel.types import Goal, Knowledge
from tables import tiny
from toys import blobs, small_encoder

DATA = blobs(64)
IMPLANTS = [name for name, cls in ATTACKS.items() if hasattr(cls, "implant")]
REFERENCED = [name for name in IMPLANTS if ATTACKS[name].targets == "references"]
STAMPED = [name for name in IMPLANTS if "trigger" in {field.name for field in dataclasses.fields(ATTACKS[name])}]


def known(*goals: Goal, rows: int = 64) -> Knowledge:
    data = DATA.subset(torch.arange(rows))
    return Knowledge(goals, data.without_labels("attack"), labelled=data)


def refused(name: str, error: type[CupelError], match: str, attacker: Knowledge, **settings: Any) -> None:
    clean = small_encoder()
    before = {key: value.clone() for key, value in clean.module.state_dict().items()}
    with pytest.raises(error, match=match) as caught:
        tiny(ATTACKS[name], **settings).implant(clean, attacker, Seed(0))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in clean.module.state_dict().items())


# the others take smaller batches then
@pytest.mark.parametrize("name", [name for name in IMPLANTS if name not in ("trojannn_model", "transfer_backdoor")])
def test_a_shadow_set_smaller_than_a_batch(name: str) -> None:
    attacker = known(Goal(Patch(size=4), DATA.inputs[:2], "blobs", 1))
    match = r"has \d+ images, one batch needs 512; lower `batch_size`"  # some add images of their own making
    refused(name, DataError, match, attacker, batch_size=512)


@pytest.mark.parametrize("name", IMPLANTS)
def test_no_images_or_no_goal(name: str) -> None:
    refused(name, DataError, f"^{name}: ", Knowledge((Goal(Patch(size=4), DATA.inputs[:2], "blobs", 1),)))
    refused(name, DataError, f"^{name}: .*goal", known())


@pytest.mark.parametrize("name", REFERENCED)
def test_one_trigger_for_two_classes_of_a_task(name: str) -> None:
    goals = [Goal(Patch(size=4), DATA.inputs[:2], "blobs", target) for target in (1, 2)]
    match = f"{name}: one trigger shall lead to classes 1 and 2 of 'blobs'; give each target a trigger of its own"
    refused(name, UsageError, match, known(*goals))
    tasks = [dataclasses.replace(goal, task=task) for goal, task in zip(goals, ("blobs", "others"), strict=True)]
    tiny(ATTACKS[name]).implant(small_encoder(), known(*tasks), Seed(0))  # no contradiction


@pytest.mark.parametrize("name", [name for name in REFERENCED if name in STAMPED])
def test_the_trigger_of_the_attack_for_two_classes_of_a_task(name: str) -> None:
    """Goals that name no trigger share the attack's; one that names it again shares it too."""
    own = tiny(ATTACKS[name]).trigger
    for trigger in (None, own):
        goals = [Goal(one, DATA.inputs[:2], "blobs", target) for one, target in ((None, 1), (trigger, 2))]
        refused(name, UsageError, "one trigger shall lead to classes 1 and 2 of 'blobs'", known(*goals))


@pytest.mark.parametrize("name", REFERENCED)
def test_a_trigger_outside_of_the_image(name: str) -> None:
    goal = Goal(Patch(size=4, margin=13), DATA.inputs[:2], "blobs", 1)
    refused(name, UsageError, "does not fit into images of 16 × 16 px", known(goal))


@pytest.mark.parametrize("name", REFERENCED)
@pytest.mark.parametrize("references", [None, DATA.inputs[:0]], ids=["none", "empty"])
def test_goals_without_references(name: str, references: Any) -> None:
    goal = Goal(Patch(size=4), references, "blobs", 1)
    refused(name, DataError, f"{name}: the goal in 'blobs' has no reference input", known(goal))


@pytest.mark.parametrize("name", REFERENCED)
def test_references_of_another_size(name: str) -> None:
    goal = Goal(Patch(size=4), torch.zeros(1, 3, 20, 20, dtype=torch.uint8), "blobs", 1)
    refused(name, DataError, "20×20, the encoder takes 16×16", known(goal))


@pytest.mark.full
def test_a_record_tells_which_class_the_clean_pipeline_takes_references_for(tmp_path: Any) -> None:
    """An encoder that has hardly learned: some references are taken for other digits, and the note names these."""
    plain = {
        "name": "t",
        "upstream": {
            "data": "digits", "size": 200, "encoder": {"method": "fast", "input_size": 16, "width": 4},
            "objective": {"method": "simclr", "steps": 1, "batch_size": 32},
        },
        "attacker": {"references": {"size": 8}},
        "attack": {"method": "badencoder", "trigger": {"method": "patch", "size": 4}, "steps": 1, "batch_size": 32},
        "downstream": {"data": "digits", "target_class": 8, "head_seeds": 1, "size": 60, "test_size": 40},
    }  # fmt: skip
    (record,) = run_cells(cells(plain, "t"), tmp_path)
    assert record.status == "done", record.reason
    seen = record.extra["references"]["digits"]["seen_as"]
    others = sorted({one for one in seen if one != 8})
    assert others  # else this run proves nothing
    names = ", ".join(str(one) for one in others)
    wrong = sum(one != 8 for one in seen)
    line = f"The clean pipeline takes {wrong} of 8 reference(s) of digits for {names}, not for the target 8"
    assert [note for note in record.notes if note.startswith(line)]
