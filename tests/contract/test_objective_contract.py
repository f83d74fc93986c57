"""Every objective: a finite loss, labels only where it needs them, one step changes all it trains, same seed = same."""

from typing import Any

import pytest
import torch

from cupel.encoders import Fast
from cupel.pretrain import pretrain_encoder
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.types import Dataset
from fingerprints import data_print, same_state
from tables import methods, tiny


@pytest.mark.parametrize(("name", "cls"), methods("objectives"))
def test_one_step(name: str, cls: Any, images: Dataset) -> None:
    objective = tiny(cls)

    def stepped() -> tuple[Any, list[bool]]:
        encoder = Fast(width=4, input_size=16).build(Seed(0))
        learner = objective.learner(encoder, images, Seed(5))
        rows = torch.arange(16)
        before = [p.detach().clone() for p in learner.parameters()]
        loss, numbers = learner.loss(Batch(images.inputs[rows], rows, Seed(9)))
        assert loss.shape == ()
        assert bool(loss.isfinite())
        assert all(value.ndim == 0 and not value.requires_grad for value in numbers.values())
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.5)
        loss.backward()
        optimizer.step()
        learner.after_step()
        held = {id(p) for p in learner.state.parameters()}
        assert all(id(p) in held for p in learner.parameters()), "a resume would forget a weight"
        return encoder, [not torch.equal(a, b) for a, b in zip(before, learner.parameters(), strict=True)]

    one, moved = stepped()
    other, _ = stepped()
    assert sum(moved) > 0.8 * len(moved), "most weights get no gradient"
    assert same_state(one.module, other.module)


@pytest.mark.parametrize(("name", "cls"), methods("objectives"))
def test_pretrain_needs_no_labels_unless_it_says_so(name: str, cls: Any, images: Dataset) -> None:
    given = images if "labels" in cls.needs else images.without_labels(name)
    before = data_print(given)
    architecture = Fast(width=4, input_size=16)
    made, history = pretrain_encoder(tiny(cls), architecture, given, Seed(5))
    again, _ = pretrain_encoder(tiny(cls), architecture, given, Seed(5))
    assert data_print(given) == before
    assert same_state(made.module, again.module)
    assert not same_state(made.module, architecture.build(Seed(5).child("init")).module)
    assert not any(part.training for part in made.module.modules())
    assert len(history["loss"]) == 2
