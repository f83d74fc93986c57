"""Every purifier: a new encoder, the given one as it was, no labels unless it says so, same seed = same weights."""

from typing import Any

import pytest
import torch

from cupel.encoders import ImageEncoder
from cupel.seeds import Seed
from cupel.types import Dataset
from fingerprints import data_print, model_print, same_state
from tables import methods, tiny


@pytest.mark.parametrize(("name", "cls"), methods("purifiers"))
def test_purifier(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    purifier = tiny(cls)
    given = images if "labels" in cls.needs else images.without_labels(name)
    model, data = model_print(encoder.module), data_print(given)
    made, again = purifier.purify(encoder, given, Seed(5)), purifier.purify(encoder, given, Seed(5))
    assert model_print(encoder.module) == model
    assert data_print(given) == data
    assert made is not encoder
    assert made.module is not encoder.module
    assert not any(part.training for part in made.module.modules())
    assert all(torch.isfinite(value).all() for value in made.module.state_dict().values())
    assert not same_state(made.module, encoder.module), "nothing was done"
    assert same_state(made.module, again.module)
    assert not same_state(made.module, purifier.purify(encoder, given, Seed(6)).module)


@pytest.mark.parametrize(("name", "cls"), methods("purifiers"))
def test_no_steps_change_nothing(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    if "steps" not in cls.__dataclass_fields__:
        pytest.skip(f"{name} counts no steps")
    made = tiny(cls, steps=0).purify(encoder, images.without_labels(name), Seed(5))
    assert made is not encoder
    assert made.module is not encoder.module
    assert same_state(made.module, encoder.module)
