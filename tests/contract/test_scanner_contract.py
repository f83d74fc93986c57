"""Every scanner: needs no labels unless it says so, leaves the model as it was, same seed = same verdict."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from cupel.encoders import ImageEncoder
from cupel.encoders.storage import save_encoder
from cupel.seeds import Seed
from cupel.types import Dataset
from cupel.verdicts import VerdictWord
from fingerprints import data_print, model_print
from tables import methods, tiny


def made(cls: Any, encoder: ImageEncoder, folder: Path) -> Any:
    """A small one; where it compares with a clean checkpoint, that of the encoder itself is there."""
    if "checkpoint" not in {field.name for field in dataclasses.fields(cls)}:
        return tiny(cls)
    save_encoder(encoder, folder / "clean.safetensors")
    return tiny(cls, checkpoint=str(folder / "clean.safetensors"))


@pytest.mark.parametrize(("name", "cls"), methods("scanners"))
def test_scanner(name: str, cls: Any, encoder: ImageEncoder, images: Dataset, tmp_path: Path) -> None:
    scanner = made(cls, encoder, tmp_path)
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
def test_too_few_images_are_not_called_clean(
    name: str, cls: Any, encoder: ImageEncoder, images: Dataset, tmp_path: Path
) -> None:
    few = images.subset(images.ids[:3] - 1000).without_labels(name)
    assert made(cls, encoder, tmp_path).scan(encoder, few, Seed(5)).verdict == "inconclusive"


@pytest.mark.parametrize(("name", "cls"), methods("scanners"))
def test_name_tells_settings_apart(name: str, cls: Any) -> None:
    presets = [cls.preset(budget) for budget in ("smoke", "standard", "paper")]
    names = {one.name for one in (*presets, tiny(cls))}
    # weights are compared or not: there forensics has no budgets, and what it names enters the name
    assert len(names) == (1 if name == "forensics" else 4)
    assert name != "forensics" or cls(checkpoint="other.safetensors").name not in names
    assert all(one.startswith(f"{name}/") for one in names)
