"""ANP: masks and noise where they belong, and the threshold that held-out images choose."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.errors import DataError
from cupel.inference import FrozenProbe
from cupel.protocols import Batch
from cupel.purify.anp import ANP, ANPLearner, prune_below
from cupel.purify.batch_norm import batch_norms
from cupel.purify.labelled import linear_head
from cupel.seeds import Seed
from planted import planted
from toys import blobs, small_encoder

DATA = blobs(48)


def classifier() -> FrozenProbe:
    encoder = small_encoder(width=4)
    with torch.no_grad():
        for i, norm in enumerate(batch_norms(encoder.module).values()):
            norm.weight.uniform_(0.5, 1.5, generator=Seed(i).torch())
            norm.bias.normal_(0, 0.3, generator=Seed(i).torch())
    return FrozenProbe(encoder, linear_head(encoder, DATA, 5e-4))


def learner(**more: Any) -> ANPLearner:
    return ANPLearner(ANP(augment=None, **more), classifier(), DATA.labels)


def batch(n: int = 16) -> Batch:
    rows = torch.arange(n)
    return Batch(DATA.inputs[rows], rows, Seed(0))


def shown(one: ANPLearner) -> tuple[Tensor, Tensor]:
    return one.shown(batch()), one.wanted(batch())


def test_masks_and_noise_are_those_of_the_paper() -> None:
    """γ → (m + δ) γ and β → (1 + ξ) β, put into a copy by hand."""
    one, draw = learner(), Seed(3).torch()
    x, _ = shown(one)
    noise = {}
    hand = copy.deepcopy(one.classifier)
    for (name, norm), mask in zip(batch_norms(hand.encoder).items(), one.masks.values(), strict=True):
        delta, xi = (torch.rand(norm.weight.shape, generator=draw) * 0.6 - 0.3 for _ in range(2))
        noise[name] = (delta, xi)
        with torch.no_grad():
            mask.uniform_(0, 1, generator=draw)
            norm.weight.mul_(mask + delta)
            norm.bias.mul_(1 + xi)
    torch.testing.assert_close(one.logits(x, noise), hand(x))


@pytest.mark.parametrize("steps", [1, 3])
def test_noise_stays_in_its_ball_and_raises_the_loss(steps: int) -> None:
    one = learner(epsilon=0.1, noise_steps=steps)
    x, y = shown(one)
    noise = one.noise(x, y)
    flat = torch.cat([part for both in noise.values() for part in both])
    assert float(flat.abs().max()) <= 0.1 + 1e-7
    assert not flat.requires_grad
    with torch.no_grad():
        assert float(F.cross_entropy(one.logits(x, noise), y)) > float(F.cross_entropy(one.logits(x), y))
    if steps == 1:
        assert {round(v, 6) for v in flat.abs().unique().tolist()} <= {0.0, 0.1}


def test_without_noise_both_losses_agree() -> None:
    one = learner(epsilon=0.0)
    loss, parts = one.loss(batch())
    assert float(parts["natural"]) == float(parts["noisy"]) == pytest.approx(float(loss.detach()), rel=1e-6)


def test_masks_stay_in_the_unit_interval_and_weights_where_they_are() -> None:
    one = learner(epsilon=0.4)
    before = {name: value.clone() for name, value in one.classifier.state_dict().items()}
    optimizer = torch.optim.SGD(one.parameters(), 2.0, momentum=0.9)
    for _ in range(8):
        loss, _ = one.loss(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        one.after_step()
        masks = torch.cat([mask.detach() for mask in one.masks.values()])
        assert 0 <= float(masks.min()) <= float(masks.max()) <= 1
    assert float(masks.min()) < 1
    assert all(torch.equal(value, before[name]) for name, value in one.classifier.state_dict().items())


def test_channels_below_the_threshold_are_pruned_and_no_others() -> None:
    norm = nn.BatchNorm2d(4)
    scales, masks = {"a.b": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {"a/b": torch.tensor([0.2, 0.5, 0.49, 1.0])}
    prune_below({"a.b": norm}, scales, masks, 0.5)
    assert norm.weight.tolist() == [0.0, 2.0, 0.0, 4.0]
    prune_below({"a.b": norm}, scales, masks, 0.0)
    assert norm.weight.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_the_largest_threshold_that_held_out_images_bear_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([0.9, 0.5, 0.8, 0.86])  # before, then at 0.9, 0.6 and 0.3
    asked = []
    monkeypatch.setattr("cupel.purify.anp.accuracy_of", lambda model, data: asked.append(len(data)) or next(told))
    settings = ANP(steps=3, batch_size=16, augment=None, lr=5.0, thresholds=(0.3, 0.6, 0.9), held_out=0.25)
    model = classifier()
    made, history = settings.purify_classifier(model, DATA, Seed(0))
    assert history["held_out"] == [0.5, 0.8, 0.86]
    assert asked == [12] * 4
    before, after = (batch_norms(one.encoder.module) for one in (model, made))
    gone = torch.cat([after[n].weight.detach() == 0 for n in before])
    kept = torch.cat([after[n].weight.detach() == before[n].weight.detach() for n in before])
    assert bool((gone | kept).all())


def test_an_encoder_without_batch_norm_is_refused() -> None:
    toy = planted(20, 0.85, 0, n=8)
    labelled = blobs(48)
    with pytest.raises(DataError, match="a PlantedNet has none"):
        ANP(steps=1, batch_size=8, augment=None).purify(toy.encoder, labelled, Seed(0))
