"""Every architecture: embeddings of the promised width, and initial weights that depend on the seed alone."""

from typing import Any

import pytest
import torch

from cupel.seeds import Seed
from fingerprints import same_state
from tables import methods, tiny


@pytest.mark.parametrize(("name", "cls"), methods("encoders"))
def test_encoder(name: str, cls: Any) -> None:
    given = {"input_size": 32} if "input_size" in cls.__dataclass_fields__ else {}  # else that of its base
    architecture = tiny(cls, **given)
    encoder = architecture.build(Seed(4))
    assert encoder.input_size == architecture.input_size == 32
    assert not any(part.training for part in encoder.module.modules())
    with torch.no_grad():
        h = encoder(torch.rand(3, 3, 32, 32, generator=Seed(0).torch()))
    assert h.shape == (3, encoder.width)
    assert bool(h.isfinite().all())
    assert encoder.card.architecture["method"] == name
    assert encoder.card.manifest is None
    assert same_state(encoder.module, architecture.build(Seed(4)).module)
    assert not same_state(encoder.module, architecture.build(Seed(5)).module)
    copied = encoder.copy()
    with torch.no_grad():
        next(copied.module.parameters()).add_(1)
    assert not same_state(encoder.module, copied.module)
