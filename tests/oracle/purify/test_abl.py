"""ABL: the held loss, the isolated rows, and a model that is trained anew."""

import dataclasses

import pytest
import torch

from cupel.encoders import ImageEncoder
from cupel.errors import DataError
from cupel.inference import FrozenProbe
from cupel.purify.abl import ABL, held_at, lowest
from cupel.purify.labelled import linear_head
from cupel.seeds import Seed
from toys import blobs, small_encoder

DATA = blobs(48)


@pytest.mark.parametrize("gate", ["flooding", "local_gradient_ascent"])
def test_the_held_loss_turns_round_at_gamma(gate: str) -> None:
    for value, sign in ((0.9, 1.0), (0.2, -1.0)):
        loss = torch.tensor(value, requires_grad=True)
        held = held_at(loss, 0.5, gate)
        held.backward()
        assert float(loss.grad) == sign
        expected = abs(value - 0.5) + 0.5 if gate == "flooding" else sign * value
        assert float(held.detach()) == pytest.approx(expected)


def test_exactly_the_lowest_losses_are_isolated() -> None:
    losses = torch.randperm(1099, generator=Seed(0).torch()).float()
    rows = lowest(losses, 0.01)
    assert len(rows) == 10  # ⌊10.99⌋
    assert sorted(losses[rows].tolist()) == list(range(10))
    assert rows.tolist() == sorted(rows.tolist())
    assert len(lowest(losses[:1000], 0.01)) == 10
    assert len(lowest(losses[:99], 0.01)) == 0


def test_the_model_is_trained_anew_and_the_isolated_are_unlearned() -> None:
    def model(seed: int) -> FrozenProbe:
        encoder = small_encoder(seed, width=4)
        return FrozenProbe(encoder, linear_head(encoder, DATA, 5e-4))

    settings = ABL(
        isolation_epochs=3, epochs=3, unlearning_epochs=4, isolated=0.1, batch_size=16, augment=None, lr=0.02,
        unlearning_lr=0.02, batch_norm="eval_affine",
    )  # fmt: skip
    one, history = settings.purify_classifier(model(0), DATA, Seed(0))
    other, _ = settings.purify_classifier(model(1), DATA, Seed(0))
    for name, value in one.encoder.module.state_dict().items():  # where it started does not matter
        assert torch.equal(value, other.encoder.module.state_dict()[name])
    assert len(history["isolated"]) == 4
    assert len(history["isolating_loss"]) == 9
    assert len(history["loss"]) == 3 * (44 // 16)
    assert len(history["unlearning_loss"]) == 4
    assert history["unlearning_loss"][-1] < history["unlearning_loss"][0]  # minus the cross entropy falls
    assert ABL.needs == {"labels", "train_set"}


def test_an_encoder_without_a_card_is_refused() -> None:
    encoder = small_encoder(width=4)
    bare = ImageEncoder(encoder.module, dataclasses.replace(encoder.card, architecture={}))
    with pytest.raises(DataError, match="does not say how it was built"):
        ABL(steps=1, isolation_epochs=1, batch_size=16).purify(bare, DATA, Seed(0))
