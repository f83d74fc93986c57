"""Every purifier: a new encoder, the given one as it was, no labels unless it says so, same seed = same weights."""

import inspect
from typing import Any

import pytest
import torch

from cupel.encoders import ImageEncoder
from cupel.errors import LabelsWithheld
from cupel.inference import FrozenProbe
from cupel.purify import label_free
from cupel.purify.base import PurifierBase
from cupel.seeds import Seed
from cupel.types import Dataset
from fingerprints import data_print, model_print, same_state
from tables import TABLES, methods, tiny

# what comes out may be what was put in
UNCHANGED = {
    "lp": "it trains the head alone: on an encoder it is the row `nothing but a new head`",
    "anp": "a channel is pruned once its mask has left 1 and accuracy allows it, which two steps do not achieve",
}
# another seed may give the same weights
SEEDLESS = UNCHANGED | {"clp": "it looks at weights alone and draws nothing"}
LABELLED = [one for one in methods("purifiers") if "labels" in one.values[1].needs]


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
    assert all(one.requires_grad and one.grad is None for one in made.module.parameters())
    assert all(torch.isfinite(value).all() for value in made.module.state_dict().values())
    assert same_state(made.module, again.module)
    if name not in UNCHANGED:
        assert not same_state(made.module, encoder.module), "nothing was done"
    if name not in SEEDLESS:
        assert not same_state(made.module, purifier.purify(encoder, given, Seed(6)).module)


@pytest.mark.parametrize(("name", "cls"), methods("purifiers"))
def test_no_steps_change_nothing(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    if "steps" not in cls.__dataclass_fields__:
        pytest.skip(f"{name} counts no steps")
    made = tiny(cls, steps=0).purify(encoder, images.without_labels(name), Seed(5))
    assert made is not encoder
    assert made.module is not encoder.module
    assert same_state(made.module, encoder.module)


@pytest.mark.parametrize(("name", "cls"), methods("purifiers"))
def test_all_are_called_alike(name: str, cls: Any) -> None:
    """What runs experiments calls them without looking."""
    if not cls.__module__.startswith("cupel."):
        pytest.skip("another package's: it owes `purify` alone")
    shared = inspect.signature(PurifierBase.purify_with_history)
    assert inspect.signature(cls.purify_with_history) == shared
    assert hasattr(cls, "purify_classifier") == ("labels" in cls.needs)
    if hasattr(cls, "purify_classifier"):
        assert list(inspect.signature(cls.purify_classifier).parameters) == list(shared.parameters)


@pytest.mark.parametrize(("name", "cls"), LABELLED)
def test_with_labels_withheld_nothing_is_touched(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    before = model_print(encoder.module)
    with pytest.raises(LabelsWithheld) as caught:
        tiny(cls).purify(encoder, images.without_labels(name), Seed(5))
    assert "\n" not in str(caught.value)
    assert model_print(encoder.module) == before


@pytest.mark.parametrize(("name", "cls"), LABELLED)
def test_a_classifier_comes_out_where_one_goes_in(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    purifier = tiny(cls)
    given = purifier.classifier(encoder, images, Seed(4))
    before = model_print(given.encoder.module), model_print(given.head)
    made, history = purifier.purify_classifier(given, images, Seed(5))
    assert (model_print(given.encoder.module), model_print(given.head)) == before
    assert isinstance(made, FrozenProbe)
    assert made.head is not given.head
    assert made(torch.as_tensor(images.inputs)[:2] / 255).shape == (2, 4)
    assert all(torch.isfinite(torch.tensor(values)).all() for values in history.values())


def test_label_free_ones_are_named_first() -> None:
    free = [name for name, cls in TABLES["purifiers"].items() if "labels" not in cls().needs]
    assert label_free() == free
    assert list(TABLES["purifiers"])[: len(free)] == free
