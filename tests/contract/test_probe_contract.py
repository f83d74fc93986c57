"""Every probe: logits for images, encoder and data as before, same seed = same classifier, and better than chance."""

from typing import Any

import pytest
import torch

from cupel.encoders import ImageEncoder
from cupel.errors import LabelsWithheld
from cupel.seeds import Seed
from cupel.types import Dataset
from fingerprints import data_print, model_print
from tables import methods, tiny


@pytest.mark.parametrize(("name", "cls"), methods("probes"))
def test_probe(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    model, data = model_print(encoder.module), data_print(images)
    x = images.inputs[torch.arange(len(images))].float() / 255
    longer = {"epochs": 30, "steps": None, "batch_size": 16}  # of these, what it has: two steps teach nothing
    probe = tiny(cls, **{k: v for k, v in longer.items() if k in cls.__dataclass_fields__})
    with torch.no_grad():
        logits = probe.fit(encoder, images, Seed(5))(x)
        again = probe.fit(encoder, images, Seed(5))(x)
    assert logits.shape == (len(images), images.num_classes)
    assert bool(logits.isfinite().all())
    assert torch.equal(logits, again)
    assert float((logits.argmax(1) == images.labels).float().mean()) > 0.5
    assert model_print(encoder.module) == model
    assert data_print(images) == data


@pytest.mark.parametrize(("name", "cls"), methods("probes"))
def test_probe_asks_for_labels_openly(name: str, cls: Any, encoder: ImageEncoder, images: Dataset) -> None:
    assert "labels" in cls.needs
    with pytest.raises(LabelsWithheld, match=f"withheld from {name}"):
        tiny(cls).fit(encoder, images.without_labels(name), Seed(5))
