import base64
import dataclasses

import pytest
import torch

from cupel.errors import DataError, UsageError
from cupel.seeds import Seed
from cupel.settings import parse
from cupel.triggers.additive import Additive, png_of
from cupel.triggers.pictures import apple


def drawn(n: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=Seed(seed).torch())


@pytest.mark.parametrize("wrap", [False, True])
def test_every_pair_of_bytes(wrap: bool) -> None:
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 3, 256, 256).contiguous()
    t = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).expand(3, 256, 256)
    y = Additive(png=png_of(t), wrap_uint8=wrap)(x, [0], Seed(0))
    total = x.int() + t.int()
    assert torch.equal(y.int(), total % 256 if wrap else total.clamp_max(255))
    assert bool((y >= x).all()) is not wrap


def test_learned_pictures_travel_in_the_settings() -> None:
    t = drawn(1, 12)[0]
    trigger = Additive(png=png_of(t))
    assert torch.equal(trigger.picture(12, 12), t)
    again = parse(Additive, dataclasses.asdict(trigger), "artefact")
    assert again == trigger
    assert torch.equal(again(drawn(2, 12, 1), [0, 1], Seed(0)), trigger(drawn(2, 12, 1), [5, 6], Seed(9)))


def test_default_whitens_the_apple_alone() -> None:
    x = drawn(2, 32)
    y, inside = Additive()(x, [0, 1], Seed(0)), apple(32, 32)
    assert (y[:, :, inside] == 255).all()
    assert torch.equal(y[:, :, ~inside], x[:, :, ~inside])


def test_apple_lies_in_the_published_box_at_every_size() -> None:
    for side in (16, 32, 64, 224):
        rows, columns = apple(side, side).nonzero().T
        assert rows.min() >= int(120 / 224 * side) - 1
        assert rows.max() <= 204 / 224 * side
        assert columns.min() >= int(128 / 224 * side) - 1
        assert columns.max() <= 195 / 224 * side
    assert 90 <= int(apple(32, 32).sum()) <= 125  # 117 in the published picture


def test_mistakes_are_one_line() -> None:
    with pytest.raises(UsageError, match="for images of 8 × 8 px, not 16 × 16 px"):
        Additive(png=png_of(drawn(1, 8)[0]))(drawn(1, 16), [0], Seed(0))
    for wrong in (
        "",
        "no base64!",
        base64.b64encode(b"\x89PNG\r\n\x1a\n").decode(),
        base64.b64encode(b"GIF89a").decode(),
    ):
        with pytest.raises(DataError, match=r"trigger\[additive\]\.png: is no PNG file in base64"):
            Additive(png=wrong)(drawn(1, 16), [0], Seed(0))
