"""Every certifier: needs labels, leaves the encoder as it was, and no patch moves what it certifies."""

from typing import Any

import pytest
import torch

from cupel.certify import certified_accuracy, measure
from cupel.certify.masking import CERTIFIED, WRONG
from cupel.encoders import ImageEncoder
from cupel.errors import LabelsWithheld, SettingsError, UsageError
from cupel.seeds import Seed
from cupel.types import Dataset
from fingerprints import data_print, model_print
from tables import methods, tiny


@pytest.mark.parametrize(("name", "cls"), methods("certifiers"))
def test_certifier(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    certifier = tiny(cls)
    model, data = model_print(encoder.module), data_print(images)
    made, again = certifier.fit(encoder, images, Seed(5)), certifier.fit(encoder, images, Seed(5))
    assert model_print(encoder.module) == model
    assert data_print(images) == data
    assert made.patch == certifier.patch
    assert torch.equal(made.predict(images), again.predict(images))
    found = certified_accuracy(made, images)
    assert torch.equal(found.outcomes != WRONG, made.predict(images) == images.labels)
    assert measure(made, images)["certified_accuracy"] == found.certified


@pytest.mark.parametrize(("name", "cls"), methods("certifiers"))
def test_no_patch_moves_what_is_certified(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    certifier = tiny(cls, steps=40) if "steps" in cls.__dataclass_fields__ else tiny(cls)
    made = certifier.fit(encoder, images, Seed(5))
    certified = images.subset(certified_accuracy(made, images).outcomes == CERTIFIED)
    side, patch, draw = 16, made.patch, Seed(7).torch()
    for _ in range(20):
        top, left = torch.randint(side - patch + 1, (2,), generator=draw).tolist()
        raw = torch.as_tensor(certified.inputs[torch.arange(len(certified))]).clone()
        raw[:, :, top : top + patch, left : left + patch] = torch.randint(0, 2, (3, patch, patch), generator=draw) * 255
        assert torch.equal(made.predict(certified.with_inputs(raw, "hit")), certified.labels)


@pytest.mark.parametrize(("name", "cls"), methods("certifiers"))
def test_bad_input_is_refused(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    assert "labels" in cls.needs
    with pytest.raises(LabelsWithheld):
        tiny(cls).fit(encoder, images.without_labels(name), Seed(5))
    with pytest.raises(SettingsError, match="patch"):
        tiny(cls, patch=16).fit(encoder, images, Seed(5))
    with pytest.raises(UsageError, match="did you mean 'smoke'"):
        cls.preset("smok")
