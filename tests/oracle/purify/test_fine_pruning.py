"""Fine-Pruning: which dimensions go, that they stay away, and that the last accepted step counts."""

from typing import Any

import pytest
import torch
from torch import nn

from cupel.errors import DataError
from cupel.inference import FrozenProbe, features
from cupel.purify.fine_pruning import FinePruning, dormant
from cupel.purify.labelled import linear_head
from cupel.purify.silencing import silence
from cupel.seeds import Seed
from planted import planted
from toys import blobs, small_encoder

DATA = blobs(48)


def identity_head(width: int) -> nn.Linear:
    head = nn.Linear(width, width, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(width))
    return head


def test_the_least_active_go_first_and_the_last_accepted_step_counts() -> None:
    """Dimension i alone decides class i; 10 images of each, so each dimension is worth a tenth."""
    width, activation = 10, torch.tensor([5.0, 1.0, 9.0, 0.0, 2.0, 8.0, 7.0, 3.0, 6.0, 4.0])
    labels = torch.arange(width).repeat(10)
    x = torch.eye(width)[labels] + 0.1 * (torch.arange(width) == 0)  # what loses its dimension goes to class 0
    gone, accuracies = dormant(activation, x, labels, identity_head(width), 0.1, 0.25)
    assert gone.nonzero().flatten().tolist() == [1, 3]  # activations 0 and 1; the third would lose 30 %
    assert accuracies == pytest.approx([1.0, 0.9, 0.8, 0.7])


def test_pruning_in_larger_steps_and_never_of_all() -> None:
    x = torch.eye(10)
    gone, accuracies = dormant(torch.arange(10.0), x, torch.zeros(10).long(), identity_head(10), 0.3, 1.0)
    assert gone.tolist() == [True] * 9 + [False]  # ties go to class 0, which is right
    assert accuracies == pytest.approx([0.1, 0.3, 0.6, 0.9])


@pytest.mark.parametrize("mode", ["eval_affine", "train"])
def test_pruned_dimensions_stay_zero_while_the_rest_is_tuned(mode: Any) -> None:
    encoder = small_encoder(width=4)
    model = FrozenProbe(encoder, linear_head(encoder, DATA, 5e-4))
    settings = FinePruning(steps=6, batch_size=16, augment=None, once=0.2, drop=1.0, lr=0.05, batch_norm=mode)
    made, history = settings.purify_classifier(model, DATA, Seed(0))
    before, after = (features(one.encoder, DATA, dtype=torch.float32, store=False) for one in (model, made))
    zero = (after == 0).all(dim=0)
    pruned = int(zero.sum())
    assert pruned >= 4 * (len(history["held_out"]) - 2) > 0
    rest = history["held_out"]
    assert rest[0] - rest[-2] < rest[0]
    assert not torch.equal(before[:, ~zero], after[:, ~zero])


def test_silencing_changes_no_other_dimension_and_can_be_repeated() -> None:
    encoder = small_encoder(width=4)
    x = DATA.inputs[:16]
    with torch.no_grad():
        before = encoder(x.float() / 255)
        again = silence(encoder, torch.tensor([3, 11]), x, "it")
        made = encoder(x.float() / 255)
        assert made[:, [3, 11]].abs().max() == 0
        others = [i for i in range(16) if i not in (3, 11)]
        torch.testing.assert_close(made[:, others], before[:, others])
        encoder.module.backbone.layer3.bn2.bias.fill_(1.0)
        again()
        assert encoder(x.float() / 255)[:, [3, 11]].abs().max() == 0


def test_encoders_of_another_kind_are_refused_and_left_alone() -> None:
    toy = planted(20, 0.85, 0, n=8)
    with pytest.raises(DataError, match="dimensions of a PlantedNet cannot be silenced"):
        silence(toy.encoder, torch.tensor([0]), toy.images.inputs[:4], "fine_pruning")
