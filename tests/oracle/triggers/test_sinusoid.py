import math

import pytest
import torch

from cupel.errors import SettingsError, UsageError
from cupel.seeds import Seed
from cupel.triggers.sinusoid import Sinusoid


@pytest.mark.parametrize(("side", "amplitude", "frequency"), [(32, 20.0, 6), (16, 40.0, 3), (28, 255.0, 1)])
def test_pixel_by_pixel(side: int, amplitude: float, frequency: int) -> None:
    x = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=Seed(side).torch())
    before = x.clone()
    y = Sinusoid(amplitude=amplitude, frequency=frequency)(x, [0, 1], Seed(0))
    assert torch.equal(x, before)
    for j in range(side):
        value = round(amplitude * math.sin(2 * math.pi * j * frequency / side))
        assert torch.equal(y[..., j].int(), (x[..., j].int() + value).clamp(0, 255))


def test_shows_whole_periods_and_no_brightness() -> None:
    x = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    row = Sinusoid()(x, [0], Seed(0))[0, 0, 0].double() - 128
    assert row.sum() == 0
    assert torch.fft.rfft(row).abs().argmax() == 6


def test_mistakes_are_one_line() -> None:
    x = torch.zeros(1, 3, 12, 12, dtype=torch.uint8)
    with pytest.raises(UsageError, match="6 periods cannot be shown on images of 12 px; choose a `frequency` below 6"):
        Sinusoid()(x, [0], Seed(0))  # every sample would hit a zero
    assert Sinusoid(frequency=5)(x, [0], Seed(0)).any()
    for wrong in (0.0, 256.0):
        with pytest.raises(SettingsError, match="amplitude"):
            Sinusoid(amplitude=wrong)
