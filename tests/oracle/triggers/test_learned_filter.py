import base64
import dataclasses

import pytest
import torch
from safetensors.torch import save

from cupel.errors import DataError, UsageError
from cupel.seeds import Seed
from cupel.settings import parse
from cupel.triggers.color_checker import ColorChecker, color_checkers
from cupel.triggers.learned_filter import FilterNet, LearnedFilter, filter_of


def drawn(n: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=Seed(seed).torch())


def changed(width: int = 4) -> FilterNet:
    net = FilterNet(width, Seed(1))
    with torch.no_grad():
        net.leave.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return net


def test_a_new_filter_is_the_identity() -> None:
    x = drawn(3)
    assert torch.equal(FilterNet(4, Seed(0))(x.float() / 255), x.float() / 255)
    assert torch.equal(filter_of(FilterNet(4, Seed(0)))(x, [0, 1, 2], Seed(0)), x)


@pytest.mark.parametrize("side", [16, 15])
def test_values_and_shape_are_those_of_images(side: int) -> None:
    x = drawn(2, side).float() / 255
    y = changed().requires_grad_(False)(x)
    assert y.shape == x.shape
    assert 0 <= float(y.min()) <= float(y.max()) <= 1
    assert float((y - x).abs().mean()) > 0.05


def test_weights_travel_in_the_settings() -> None:
    net, x = changed(), drawn(5)
    trigger = filter_of(net)
    again = parse(LearnedFilter, dataclasses.asdict(trigger), "artefact")
    assert again == trigger
    exact = (net(x.float() / 255).detach() * 255).round()
    assert (again(x, list(range(5)), Seed(0)).float() - exact).abs().max() <= 1


def test_an_image_does_not_care_for_its_neighbours() -> None:
    trigger, x = filter_of(changed()), drawn(150)
    whole = trigger(x, list(range(150)), Seed(0))
    order = torch.randperm(150, generator=Seed(1).torch())[:67]
    assert torch.equal(trigger(x[order], order.tolist(), Seed(2)), whole[order])
    assert torch.equal(trigger(x[149:], [149], Seed(2)), whole[149:])


def test_the_callers_precision_does_not_matter() -> None:
    trigger, x = filter_of(changed()), drawn(4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = trigger(x, [0, 1, 2, 3], Seed(0))
    assert torch.equal(rough, trigger(x, [0, 1, 2, 3], Seed(0)))


def encoded(tensors: dict[str, torch.Tensor]) -> str:
    return base64.b64encode(save(tensors)).decode()


@pytest.mark.parametrize(
    "weights",
    [
        "no base64!",
        base64.b64encode(b"no safetensors").decode(),
        encoded({"enter.weight": torch.zeros(4, 3, 3, 3)}),
        encoded({"enter.weight": torch.zeros(4096, 3, 1, 1)}),
        encoded({k: v * float("nan") for k, v in FilterNet(2, Seed(0)).state_dict().items()}),
        encoded({**FilterNet(2, Seed(0)).state_dict(), "more": torch.zeros(1)}),
    ],
)
def test_foreign_weights_are_refused(weights: str) -> None:
    with pytest.raises(DataError, match="learned_filter"):
        LearnedFilter(weights=weights)(drawn(1), [0], Seed(0))


def test_without_weights_there_is_no_network() -> None:
    with pytest.raises(UsageError, match="has no network"):
        LearnedFilter().network()


def test_all_pairs_of_colours_in_a_checkerboard() -> None:
    x, seen = torch.full((1, 3, 16, 16), 7, dtype=torch.uint8), set()
    for checker in color_checkers(size=4, margin=1):
        y = checker(x, [0], Seed(0))[0]
        square = y[:, 11:15, 11:15]
        first, second = square[:, 0, 0], square[:, 0, 1]
        assert not torch.equal(first, second)
        for i in range(4):
            for j in range(4):
                assert torch.equal(square[:, i, j], first if (i + j) % 2 == 0 else second)
        assert int((y != 7).any(dim=0).sum()) == 16
        seen.add((*first.tolist(), *second.tolist()))
        again = parse(ColorChecker, {**dataclasses.asdict(checker), "colors": list(checker.colors)}, "artefact")
        assert again == checker
    assert len(seen) == 6
