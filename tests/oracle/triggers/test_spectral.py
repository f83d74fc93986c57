import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from cupel.errors import SettingsError, UsageError
from cupel.seeds import Seed
from cupel.settings import parse
from cupel.triggers.spectral import Spectral, block_wave

YUV = np.array([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.100]])
RGB = np.array([[1.0, 0.0, 1.14], [1.0, -0.396, -0.581], [1.0, 2.029, 0.0]])
PUBLISHED = ((15, 15), (31, 31))


def images(n: int, height: int, width: int, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, (n, 3, height, width), dtype=torch.uint8, generator=Seed(height * width).torch())


def literal(image: np.ndarray, beta: float, window: int, positions: tuple, to_yuv: np.ndarray) -> np.ndarray:
    """RGB → YUV → DCT of each block → + β → back, on an image padded by reflection; grey levels, neither rounded nor
    cut."""
    height, width = image.shape[1:]
    pads = [(0, 0), (0, -height % window), (0, -width % window)]
    yuv = np.einsum("dc,chw->dhw", to_yuv, np.pad(image.astype(np.float64), pads, mode="reflect"))
    for channel in (1, 2):
        for top in range(0, yuv.shape[1], window):
            for left in range(0, yuv.shape[2], window):
                block = yuv[channel, top : top + window, left : left + window]
                coefficients = dctn(block, norm="ortho")
                for row, column in positions:
                    coefficients[row, column] += beta
                block[:] = idctn(coefficients, norm="ortho")
    return np.einsum("dc,chw->dhw", RGB, yuv)[:, :height, :width]


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (40, 48), (33, 63)])
def test_precomputed_wave_is_the_whole_chain_on_any_image(size: tuple[int, int]) -> None:
    x = images(3, *size)
    trigger = Spectral(magnitude=100.0)
    wave, y = trigger.wave(*size), trigger(x, [0, 1, 2], Seed(0))
    for one, made in zip(x.numpy(), y.numpy(), strict=True):
        exact = literal(one, 100.0, 32, PUBLISHED, np.linalg.inv(RGB))
        assert np.abs(exact - one - wave).max() < 1e-9, "it depends on the image"
        assert np.array_equal(made, np.clip(np.rint(exact), 0, 255)), "as bytes"
        # the published matrices are rounded: their round trip alone moves bright pixels by 0.4 levels
        published = literal(one, 100.0, 32, PUBLISHED, YUV)
        assert np.abs(published - one - wave).max() < 0.4
        assert np.abs(np.clip(np.rint(published), 0, 255) - made).max() <= 1


def test_transform_is_orthonormal_and_the_wave_is_its_unit_vectors() -> None:
    block = np.random.default_rng(0).normal(size=(32, 32))
    assert np.abs(idctn(dctn(block, norm="ortho"), norm="ortho") - block).max() < 1e-5
    assert np.linalg.norm(dctn(block, norm="ortho")) == pytest.approx(np.linalg.norm(block))
    for window, positions in ((32, PUBLISHED), (8, ((0, 0), (0, 3), (5, 2)))):
        wanted = np.zeros((window, window))
        for place in positions:
            wanted[place] = 1
        assert np.abs(dctn(block_wave(window, positions), norm="ortho") - wanted).max() < 1e-12


def test_energy_and_colours_are_the_derived_ones() -> None:
    u, v = (Spectral(channels=(one,)).wave(32, 32) for one in "uv")
    du, dv = u[2] / 2.029, v[0] / 1.14
    for delta in (du, dv):
        assert (delta**2).sum() == pytest.approx(2 * 100**2)
        assert np.sqrt((delta**2).mean()) == pytest.approx(np.sqrt(2) * 100 / 32)
        assert np.abs(delta).max() == pytest.approx(10.65, abs=0.01)
    wave = Spectral().wave(32, 32)
    assert np.allclose(wave, u + v)
    assert np.sqrt((wave**2).mean(axis=(1, 2))) == pytest.approx([5.04, 4.32, 8.97], abs=0.005)
    assert np.abs(wave).max(axis=(1, 2)) == pytest.approx([12.1, 10.4, 21.6], abs=0.05)
    assert np.abs(wave.mean(axis=(1, 2))).max() < 1e-9
    assert np.abs(np.einsum("c,chw->hw", YUV[0], wave)).max() <= 0.02, "brightness"


def psnr(beta: float, side: int = 32) -> float:
    x = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
    error = (Spectral(magnitude=beta)(x, [0], Seed(0)).double() - 128).square().mean()
    return float(10 * torch.log10(255**2 / error))


def test_strength_in_decibels() -> None:
    assert psnr(100) == pytest.approx(31.95, abs=0.05)
    assert [psnr(beta) for beta in (50, 150, 200)] == pytest.approx([37.97, 28.43, 25.93], abs=0.06)
    once, twice = ((Spectral(magnitude=beta).wave(32, 32) ** 2).mean() for beta in (100.0, 200.0))
    assert 10 * np.log10(255**2 / once) == pytest.approx(31.95, abs=0.005)
    assert 10 * np.log10(twice / once) == pytest.approx(6.0206, abs=1e-4)
    assert psnr(100) - psnr(200) == pytest.approx(6.02, abs=0.05)  # whole grey levels
    x = images(2, 32, 32)
    assert torch.equal(Spectral(magnitude=0.0)(x, [0, 1], Seed(0)), x)


def test_saturates_and_never_wraps() -> None:
    x = torch.stack([torch.full((3, 32, 32), value, dtype=torch.uint8) for value in (255, 0)])
    white, black = Spectral()(x, [0, 1], Seed(0))
    assert white.min() >= 255 - 22
    assert black.max() <= 22
    strong = Spectral(magnitude=1e9)(x, [0, 1], Seed(0))  # overflows no integer
    assert strong.unique().tolist() == [0, 255]


def test_horizontal_flip_negates_the_wave() -> None:
    for width in (32, 64):
        wave = Spectral().wave(32, width)
        assert np.allclose(wave[:, :, ::-1], -wave)
    even = Spectral(positions=((15, 14),)).wave(32, 32)
    assert np.allclose(even[:, :, ::-1], even)
    cut = Spectral().wave(32, 40)
    assert not np.allclose(cut[:, :, ::-1], -cut)


def test_small_images_get_a_smaller_window() -> None:
    wave = Spectral().wave(16, 16)
    assert np.allclose(wave, Spectral(magnitude=50.0, window=16, positions=((7, 7), (15, 15))).wave(16, 16))
    for channel in range(3):  # as strong per pixel as at 32
        large = np.sqrt((Spectral().wave(32, 32)[channel] ** 2).mean())
        assert np.sqrt((wave[channel] ** 2).mean()) == pytest.approx(large)
    assert np.allclose(wave[:, :, ::-1], -wave)
    assert psnr(100, side=16) == pytest.approx(31.95, abs=0.1)
    assert Spectral().wave(1, 1).shape == (3, 1, 1)


def test_mistakes_are_one_line() -> None:
    with pytest.raises(UsageError, match="window of 32 px does not fit into images of 16 × 40 px"):
        Spectral(shrink=False)(images(1, 16, 40), [0], Seed(0))
    with pytest.raises(SettingsError, match="magnitude"):
        Spectral(magnitude=-1.0)
    with pytest.raises(SettingsError, match="magnitude"):
        Spectral(magnitude=float("nan"))
    with pytest.raises(SettingsError, match=r"positions: a frequency lies outside 0 … 15"):
        Spectral(window=16)
    with pytest.raises(SettingsError, match="twice"):
        Spectral(channels=("u", "u"))
    read = parse(Spectral, {"positions": [[3, 5]], "channels": ["v"], "magnitude": 60}, "exp.yaml")
    assert read == Spectral(positions=((3, 5),), channels=("v",), magnitude=60.0)
    with pytest.raises(TypeError, match="uint8"):
        Spectral()(torch.rand(1, 3, 32, 32), [0], Seed(0))
