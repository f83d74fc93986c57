"""Every scanner: needs no labels unless it says so, leaves the model as it was, same seed = same verdict."""

import json
from typing import Any, get_args

import numpy as np
import pytest

from cupel.encoders import ImageEncoder
from cupel.seeds import Seed
from cupel.types import Dataset, VerdictWord
from fingerprints import data_print, model_print
from tables import methods, tiny


@pytest.mark.parametrize(("name", "cls"), methods("scanners"))
def test_scanner(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    scanner = tiny(cls)
    given = images if "labels" in cls.needs else images.without_labels(name)
    model, data = model_print(encoder.module), data_print(given)
    said, again = scanner.scan(encoder, given, Seed(5)), scanner.scan(encoder, given, Seed(5))
    assert model_print(encoder.module) == model
    assert data_print(given) == data
    assert said.verdict in get_args(VerdictWord)
    assert said.reason
    assert said.tested
    assert np.isfinite([said.score, said.threshold]).all()
    if said.verdict in ("backdoored", "suspicious", "clean-by-test") and said.evidence:
        assert (said.score >= said.threshold) or said.verdict != "backdoored"
    for one in said.evidence:
        assert one.mask.shape == (16, 16)
        assert one.pattern.shape == (3, 16, 16)
        assert one.mask.dtype == one.pattern.dtype == np.float32
        assert 0 <= one.mask.min() <= one.mask.max() <= 1
        assert 0 <= one.pattern.min() <= one.pattern.max() <= 1
    json.dumps(said.to_json(), allow_nan=False)
    assert said.to_json() == again.to_json()
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(said.evidence, again.evidence, strict=True))


@pytest.mark.parametrize(("name", "cls"), methods("scanners"))
def test_too_few_images_are_not_called_clean(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    few = images.subset(images.ids[:3] - 1000).without_labels(name)
    assert tiny(cls).scan(encoder, few, Seed(5)).verdict == "inconclusive"


@pytest.mark.parametrize(("name", "cls"), methods("scanners"))
def test_name_tells_settings_apart(name: str, cls: Any) -> None:
    names = {one.name for one in (cls.preset("smoke"), cls.preset("standard"), cls.preset("paper"), tiny(cls))}
    assert len(names) == 4
    assert all(one.startswith(f"{name}/") for one in names)
