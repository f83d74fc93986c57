"""Every trigger: uint8 in and out, a new object, and an image's change depends on (seed, id) alone."""

from typing import Any

import pytest
import torch

from cupel.seeds import Seed
from cupel.types import Dataset
from tables import methods, tiny


@pytest.mark.parametrize(("name", "cls"), methods("triggers"))
def test_trigger(name: str, cls: Any, images: Dataset) -> None:
    trigger, raw, ids = tiny(cls), images.inputs, images.ids.tolist()
    assert isinstance(raw, torch.Tensor)
    before = raw.clone()
    out = trigger(raw, ids, Seed(7))
    assert out.dtype == torch.uint8
    assert out.shape == raw.shape
    assert torch.equal(raw, before), "the input was changed"
    assert out.data_ptr() != raw.data_ptr()
    assert (out != raw).flatten(1).any(dim=1).all(), "some image bears no trigger"
    assert torch.equal(out, tiny(cls)(raw, ids, Seed(7)))

    order = torch.randperm(len(raw), generator=Seed(3).torch())[:20]
    shuffled = trigger(raw[order], [ids[i] for i in order.tolist()], Seed(7))
    assert torch.equal(shuffled, out[order]), "the change depends on the batch, not on the id"


@pytest.mark.parametrize(("name", "cls"), methods("triggers"))
def test_what_is_shown_is_what_is_put_on(name: str, cls: Any, images: Dataset) -> None:
    trigger = tiny(cls)
    shown = trigger.mask_and_pattern(16)
    if shown is None:
        return  # the place differs from image to image
    mask, pattern = shown
    assert mask.shape == (16, 16)
    assert pattern.shape == (3, 16, 16)
    assert pattern.dtype == torch.uint8
    assert 0 <= float(mask.min()) <= float(mask.max()) <= 1
    raw = images.inputs[torch.arange(8)]
    expected = (1 - mask) * raw + mask * pattern
    # rounded, or cut off where the published code cuts
    assert (trigger(raw, list(range(8)), Seed(0)) - expected).abs().max() < 1
