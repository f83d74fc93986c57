"""Bad input is refused or inconclusive, for every label-free scanner, and never scored."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cupel.cost import peak_memory_mib
from cupel.errors import CupelError, DataError
from cupel.inversion import concentration
from cupel.scan.admission import admit, inner_spread
from cupel.scan.decree import Decree
from cupel.scan.indicators import Indicators
from cupel.scan.passes import Passes
from cupel.scan.pscan import PScan
from cupel.scan.ssl_cleanse import SSLCleanse
from cupel.seeds import Seed
from cupel.types import Dataset
from cupel.verdicts import Verdict
from planted import PlantedEncoder, planted

SCANNERS = [
    pytest.param(Decree(steps=40, batch_size=24), id="decree"),
    pytest.param(Decree(variant="linf", steps=4, num_seeds=1), id="linf"),
    pytest.param(Decree(variant="frequency", steps=4, num_seeds=1), id="frequency"),
    pytest.param(PScan(batch_size=4, steps=20, stride=0.25), id="pscan"),
    pytest.param(SSLCleanse(num_clusters=4, steps=10, batch_size=8), id="ssl_cleanse"),
    pytest.param(Indicators(stamps=6, blends=2), id="indicators"),
]
TOY = planted(20, 0.85, 0)


class Odd(nn.Module):
    """A linear map that is broken in some way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(768, 8, generator=Seed(0).torch()))
        if kind == "nan weight":
            with torch.no_grad():
                self.weight[3, 2] = float("nan")

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ self.weight
        return {"nan": z / 0, "huge": z * 1e38 * 1e3, "collapsed": 0 * z + 3, "nearly": 1e-6 * z + 3}.get(self.kind, z)


class Turned(nn.Module):
    """Another encoder with its features rotated and scaled."""

    def __init__(self, inner: nn.Module, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale
        self.register_buffer("turn", torch.linalg.qr(torch.randn(16, 16, generator=Seed(1).torch()))[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (self.inner(x) @ self.turn)


def encoder(module: nn.Module) -> PlantedEncoder:
    return PlantedEncoder(module)


def with_pixels(pixels: Tensor) -> Dataset:
    return TOY.images.with_inputs(pixels.to(torch.uint8), "odd")


def inconclusive(said: Verdict, why: str) -> bool:
    json.dumps(said.to_json(), allow_nan=False)
    return (said.verdict, said.score, said.evidence) == ("inconclusive", 0.0, ()) and why in said.reason


@pytest.mark.parametrize("scanner", SCANNERS)
def test_images_that_say_nothing_are_inconclusive(scanner: Any) -> None:
    def scan(images: Dataset) -> Verdict:
        return scanner.scan(TOY.encoder, images.without_labels("scanner"), Seed(0))

    pixels = TOY.images.inputs
    assert inconclusive(scan(TOY.images.subset(torch.arange(63))), "63 images were given, at least 64")
    assert inconclusive(scan(with_pixels(pixels[torch.arange(256) % 63])), "63 of the 256 images can be used")
    assert inconclusive(scan(with_pixels(pixels * 0 + 7)), "256 show one colour only")
    shades = torch.arange(256).view(-1, 1, 1, 1).expand(256, 3, 16, 16)
    assert inconclusive(scan(with_pixels(shades)), "0 of the 256 images")


@pytest.mark.parametrize("scanner", SCANNERS)
def test_wrong_images_are_errors(scanner: Any) -> None:
    with pytest.raises(DataError, match="images are 20×20, the encoder takes 16×16; resize"):
        scanner.scan(TOY.encoder, with_pixels(torch.zeros(256, 3, 20, 20)), Seed(0))
    with pytest.raises(DataError, match=r"scaled to \[0, 1\]"):
        scanner.scan(TOY.encoder, with_pixels(TOY.images.inputs // 128), Seed(0))


@pytest.mark.parametrize("scanner", SCANNERS)
def test_broken_encoders(scanner: Any) -> None:
    with pytest.raises(CupelError, match="PlantedEncoder: 'weight' holds NaN"):
        scanner.scan(encoder(Odd("nan weight")), TOY.images, Seed(0))
    for kind in ("nan", "huge"):
        with pytest.raises(CupelError, match="PlantedEncoder: gives NaN or infinite"):
            scanner.scan(encoder(Odd(kind)), TOY.images, Seed(0))
    for kind in ("collapsed", "nearly"):
        assert inconclusive(scanner.scan(encoder(Odd(kind)), TOY.images, Seed(0)), "same embedding for all")


@pytest.mark.parametrize("scanner", SCANNERS)
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e30])
def test_rotated_or_scaled_features_change_no_verdict(scanner: Any, scale: float) -> None:
    scanner = dataclasses.replace(scanner, precision="fp32")
    for net in (TOY.encoder, TOY.twin):
        plain = scanner.scan(net, TOY.images, Seed(0))
        turned = scanner.scan(encoder(Turned(net.module, scale)), TOY.images, Seed(0))
        assert turned.verdict == plain.verdict
        assert turned.score == pytest.approx(plain.score, abs=0.05)


@pytest.mark.parametrize("scanner", SCANNERS)
def test_what_it_took_is_told(scanner: Any) -> None:
    said = scanner.scan(TOY.encoder, TOY.images, Seed(0))
    assert said.details["forward_images"] > said.details["backward_images"] >= 0
    assert said.peak_memory_mib is not None
    assert said.peak_memory_mib > 50
    assert "peak_memory_mib" not in said.to_json()
    assert said == dataclasses.replace(said, peak_memory_mib=None)


def test_counts_by_hand() -> None:
    method = Decree(steps=10, batch_size=24, num_seeds=2, precision="fp32")
    details = method.scan(TOY.encoder, TOY.images, Seed(0)).details
    # 64 to be admitted, 32 to find the scale, 205 clean, 51 held out, and 2 · 10 · 24 in the inversion
    assert details["forward_images"] == 64 + 32 + 205 + 51 + 480
    assert details["backward_images"] == 480
    windows = PScan(batch_size=4, steps=3, stride=0.25, precision="fp32").scan(TOY.encoder, TOY.images, Seed(0)).details
    assert windows["windows"] == 16
    assert windows["backward_images"] == 16 * 3 * 4
    assert windows["forward_images"] == 64 + 32 + 192 + 16 * 3 * 4 + 16 * 64


def test_good_input_is_admitted_and_left_alone() -> None:
    module = TOY.encoder.module.train()
    assert admit(TOY.encoder, TOY.images.without_labels("scanner")) is None
    assert module.training
    module.eval()
    assert admit(TOY.encoder, TOY.images.subset(torch.arange(10)), min_images=10) is None
    assert admit(TOY.encoder, TOY.images.subset(torch.arange(10)), min_images=11) is not None


def test_repeated_images_among_enough_others_do_no_harm() -> None:
    rows = torch.cat([torch.arange(100), torch.zeros(156, dtype=torch.int64)])
    assert admit(TOY.encoder, with_pixels(TOY.images.inputs[rows])) is None


def test_inner_spread() -> None:
    z = torch.tensor([[4.0, 3.0], [4.0, -3.0]])
    assert inner_spread(z) == pytest.approx(3 / 5)
    assert inner_spread(1e30 * z) == pytest.approx(3 / 5)
    assert inner_spread(torch.zeros(3, 2)) == 0


def test_passes_scale_by_powers_of_two_and_count() -> None:
    images = TOY.images.inputs
    plain = Passes(TOY.twin, images, "fp32")
    huge = Passes(encoder(Scaled(TOY.twin.module)), images, "fp32")
    a, b = plain.embed(images), huge.embed(images)
    assert torch.equal(concentration(a), concentration(b))
    assert float(b.abs().max()) < 2
    assert (plain.forward, plain.backward) == (64 + 32 + 256, 0)
    x = (images[:5].float() / 255).requires_grad_(True)
    plain(x)
    assert (plain.forward, plain.backward) == (64 + 32 + 261, 5)
    assert plain.costs() == {"forward_images": 357.0, "backward_images": 5.0}


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2.0**90


def test_peak_memory() -> None:
    held = torch.ones(2**24)  # 64 MiB
    peak = peak_memory_mib(torch.device("cpu"))
    assert peak is not None
    assert peak > held.numel() * 4 / 2**20
