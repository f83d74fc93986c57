from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cupel.attack.trojannn_poison import TrojanNNPoison, exciting_picture, most_connected, ridge_head
from cupel.errors import DataError
from cupel.seeds import Seed
from cupel.triggers import Patch
from cupel.triggers.additive import Additive
from cupel.triggers.pictures import apple
from cupel.types import Dataset, Goal, Knowledge
from fingerprints import model_print
from toys import blobs, small_encoder, trained_encoder


class Brightness(nn.Module):
    """Two dimensions: mean of the red pixels, minus the mean of the green ones."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0].mean(dim=(1, 2)), -x[:, 1].mean(dim=(1, 2))], dim=1)


class Plain:
    width, input_size = 2, 32

    def __init__(self) -> None:
        self.module = Brightness()

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)


def known(**more: Any) -> Knowledge:
    return Knowledge((Goal(target_class=1),), **more)


def optimised(encoder: Any, neurons: list[int], side: int, **more: Any) -> tuple[Tensor, list[float]]:
    options = {"target": 100.0, "steps": 30, "step_size": 0.1, "radius": 0.3, "tolerance": 1e-3} | more
    return exciting_picture(encoder, torch.tensor(neurons), apple(side, side), **options)


def test_neurons_of_a_handmade_matrix_in_both_directions() -> None:
    weight = torch.tensor([[1.0, -4.0, 0.0, 2.0], [1.0, 3.0, 0.5, -2.0], [1.0, 0.0, 0.5, 2.0]])
    assert most_connected(weight, 2, "out").tolist() == [1, 3]  # columns: 3, 7, 1, 6
    assert most_connected(weight, 2, "in").tolist() == [0, 1]  # rows: 7, 6.5, 3.5
    assert most_connected(torch.ones(3, 4), 2, "out").tolist() == [0, 1], "ties: the first"


def test_head_is_the_least_squares_fit() -> None:
    h = torch.randn(300, 6, dtype=torch.float64, generator=Seed(0).torch())
    labels = (h[:, 2] > 0).long() + 2 * (h[:, 4] > 0).long()
    weight = ridge_head(h, labels, 4, share=0.0)
    with_bias = torch.cat([h, torch.ones(300, 1)], dim=1)
    expected = torch.linalg.lstsq(with_bias, nn.functional.one_hot(labels, 4).double()).solution[:-1].T
    assert torch.allclose(weight, expected, atol=1e-10)
    assert set(most_connected(ridge_head(h, labels, 4), 2, "out").tolist()) == {2, 4}
    assert torch.isfinite(ridge_head(torch.zeros(5, 3), torch.arange(5) % 2, 2)).all(), "a collapsed encoder"


def test_picture_of_a_linear_encoder_has_a_closed_form() -> None:
    inside = apple(32, 32)
    tau, costs = optimised(Plain(), [0, 1], 32)
    # red is driven up, where it is 1 already; green down to 1 − 0.3; blue does not matter
    assert torch.allclose(tau[0], inside.float())
    assert torch.allclose(tau[1], 0.7 * inside.float(), atol=1e-6)
    assert torch.allclose(tau[2], inside.float())
    assert len(costs) == 4, "three steps of 0.1; the fourth changes nothing"
    share = float(inside.float().mean())
    assert costs[0] == pytest.approx((share - 100) ** 2 + (share + 100) ** 2)
    assert costs[-1] == pytest.approx((share - 100) ** 2 + (0.7 * share + 100) ** 2)


def test_stops_at_a_cost_that_is_small_enough() -> None:
    share = float(apple(32, 32).float().mean())
    tau, costs = optimised(Plain(), [0], 32, target=0.9 * share, tolerance=1e-6)
    assert len(costs) == 2
    assert costs[1] < 1e-6
    assert torch.allclose(tau[0], 0.9 * apple(32, 32).float())
    assert optimised(Plain(), [0], 32, steps=0)[1] == [pytest.approx((share - 100) ** 2)]


def test_picture_stays_in_its_bounds_and_gets_better() -> None:
    encoder = trained_encoder(blobs())
    before, first = model_print(encoder.module), next(encoder.module.parameters())
    first.grad = gradient = torch.full_like(first, 3.0)
    tau, costs = optimised(encoder, [0, 1, 2], 16)
    inside = apple(16, 16)
    assert (tau[:, ~inside] == 0).all()
    assert (tau - inside.float()).abs().max() <= 0.3 + 1e-6
    assert tau.min() >= 0
    assert tau.max() <= 1
    assert min(costs) < costs[0]
    with torch.no_grad():
        cost = (encoder(tau[None])[0, :3] - 100).square().sum()
    assert float(cost) == pytest.approx(min(costs), rel=1e-4), "the best, not the last"
    assert model_print(encoder.module) == before
    assert torch.equal(first.grad, gradient), "left from training"


@pytest.mark.parametrize("wrap", [False, True])
def test_poisons_with_the_learned_picture(wrap: bool) -> None:
    clean, encoder = blobs(), trained_encoder(blobs())
    attack = TrojanNNPoison(steps=20, wrap_uint8=wrap)
    made = attack.poison(clean, known(surrogate=encoder), Seed(0))
    assert len(made.rows) == 26
    assert (made.data.labels[made.rows] == 1).all()
    trigger = made.goals[0].trigger
    assert isinstance(trigger, Additive)
    t, inside = trigger.picture(16, 16).long(), apple(16, 16)
    assert (t[:, inside] >= 178).all(), "255 · 0.7"
    assert (t[:, ~inside] == 0).all()
    assert t[:, inside].unique().numel() > 1, "nothing was optimised"
    x, y = clean.inputs[made.rows].long(), made.data.inputs[made.rows].long()
    assert torch.equal(y, (x + t) % 256 if wrap else (x + t).clamp_max(255))
    if not wrap:
        assert (y >= x).all()
    again = attack.poison(clean, known(surrogate=encoder), Seed(0))
    assert again.goals == made.goals
    assert torch.equal(again.data.inputs, made.data.inputs)


def test_a_goal_keeps_its_own_trigger() -> None:
    clean, goal = blobs(), Goal(Patch(size=4), target_class=1)
    made = TrojanNNPoison().poison(clean, Knowledge((goal,)), Seed(0))
    assert made.goals == (goal,)


def test_mistakes_are_one_line() -> None:
    clean, encoder = blobs(64), small_encoder()
    one_class = Dataset(clean.inputs, torch.ones(64, dtype=torch.int64), clean.ids, name="one")
    cases = [
        (TrojanNNPoison(), clean, known(), "needs a surrogate encoder"),
        (TrojanNNPoison(), clean, known(surrogate=small_encoder(size=32)), "images are 16×16, the encoder takes 32×32"),
        (TrojanNNPoison(neurons=33), clean, known(surrogate=encoder), "33 neurons of an embedding of 32 dimensions"),
        (TrojanNNPoison(), one_class, known(surrogate=encoder), "single class"),
        (TrojanNNPoison(poison_rate=0.0), clean, known(surrogate=encoder), "selects none of 64 images"),
    ]
    for attack, data, knowledge, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            attack.poison(data, knowledge, Seed(0))
        assert "\n" not in str(caught.value)
    assert TrojanNNPoison.needs == {"labels", "surrogate"}
