"""Every filter: reads no labels unless it says so, leaves encoder and images as they were, same seed = same rows."""

from typing import Any

import pytest
import torch

from cupel.encoders import ImageEncoder
from cupel.errors import DataError
from cupel.seeds import Seed
from cupel.types import Dataset
from fingerprints import data_print, model_print
from tables import methods, tiny


@pytest.mark.parametrize(("name", "cls"), methods("filters"))
def test_filter(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    method = tiny(cls)
    given = images if "labels" in cls.needs else images.without_labels(name)
    model, data = model_print(encoder.module), data_print(given)
    kept, again = method.keep(given, encoder, Seed(5)), method.keep(given, encoder, Seed(5))
    assert model_print(encoder.module) == model
    assert data_print(given) == data
    assert kept.dtype == torch.bool
    assert kept.shape == (len(images),)
    assert torch.equal(kept, again)


@pytest.mark.parametrize(("name", "cls"), methods("filters"))
def test_too_few_images_are_refused(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    with pytest.raises(DataError, match="images"):
        tiny(cls).keep(images.subset(torch.arange(3)).without_labels(name), encoder, Seed(5))
