"""Every attack: what it is given stays as it was, and what it says it changed is all that it changed."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from cupel.encoders import ImageEncoder
from cupel.errors import CupelError
from cupel.seeds import Seed
from cupel.types import Dataset, Knowledge
from fingerprints import data_print, model_print, norm_tensors, same_state
from tables import TABLES, methods, tiny


def of_kind(verb: str) -> list[Any]:
    return [one for one in methods("attacks") if hasattr(one.values[1], verb)]


def test_every_attack_has_one_verb() -> None:
    for name, cls in TABLES["attacks"].items():
        assert hasattr(cls, "poison") != hasattr(cls, "implant"), name


@pytest.mark.parametrize(("name", "cls"), of_kind("poison"))
def test_data_attack(name: str, cls: Any, images: Dataset, attacker: Knowledge, encoder: ImageEncoder) -> None:
    attack = tiny(cls)
    given = images if "labels" in attack.needs else images.without_labels(name)
    attacker = dataclasses.replace(attacker, surrogate=encoder if "surrogate" in attack.needs else None)
    before = data_print(given)
    made, again = attack.poison(given, attacker, Seed(5)), attack.poison(given, attacker, Seed(5))
    assert data_print(given) == before
    assert isinstance(given.inputs, Tensor)
    assert isinstance(made.data.inputs, Tensor)
    assert made.data.inputs.dtype == torch.uint8
    assert len(made.rows) == len(set(made.rows.tolist())) == len(made.sources) > 0
    assert bool(((made.sources >= -1) & (made.sources < len(given))).all())
    assert set(made.rows.tolist()) <= set(range(len(made.data)))
    untouched = torch.ones(len(made.data), dtype=torch.bool)
    untouched[made.rows] = False
    old = {row: given.inputs[i] for i, row in enumerate(given.ids.tolist())}
    for row in untouched.nonzero().flatten().tolist():
        assert torch.equal(made.data.inputs[row], old[int(made.data.ids[row])])
    assert all(goal.trigger is not None for goal in made.goals)
    assert data_print(made.data) == data_print(again.data)
    assert torch.equal(made.rows, again.rows)


@pytest.mark.parametrize(("name", "cls"), of_kind("implant"))
def test_encoder_attack(name: str, cls: Any, encoder: ImageEncoder, images: Dataset, attacker: Knowledge) -> None:
    attack = tiny(cls)
    assert attacker.shadow is not None
    model, data = model_print(encoder.module), data_print(attacker.shadow)
    made, again = attack.implant(encoder, attacker, Seed(5)), attack.implant(encoder, attacker, Seed(5))
    assert model_print(encoder.module) == model
    assert data_print(attacker.shadow) == data
    assert made.model.module is not encoder.module
    assert not same_state(made.model.module, encoder.module), "nothing was implanted"
    assert same_state(made.model.module, again.model.module)
    assert not any(part.training for part in made.model.module.modules())
    clean, implanted = norm_tensors(encoder.module), norm_tensors(made.model.module)
    assert clean
    assert all(torch.equal(clean[k], implanted[k]) for k in clean), "BatchNorm moved"
    assert len(made.goals) == len(attacker.goals)
    assert all(goal.trigger is not None for goal in made.goals)
    assert all(torch.tensor(values).isfinite().all() for values in made.history.values())


@pytest.mark.parametrize(("name", "cls"), methods("attacks"))
def test_an_attacker_without_goals_is_an_error(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    nothing = Knowledge(goals=(), shadow=images, labelled=images)
    verb, given = ("poison", images) if hasattr(cls, "poison") else ("implant", encoder)
    with pytest.raises(CupelError):
        getattr(tiny(cls), verb)(given, nothing, Seed(5))
