"""Weight forensics against hand-made fine-tunings of a small encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cupel.encoders import ImageEncoder
from cupel.encoders.storage import save_encoder
from cupel.errors import CheckpointError, CupelError, DataError, UsageError
from cupel.scan.forensics import Forensics
from cupel.seeds import Seed
from cupel.verdicts import Reference, Verdict
from fingerprints import model_print
from toys import blobs, small_encoder

IMAGES = blobs(64)


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    file = tmp_path / "clean.safetensors"
    save_encoder(small_encoder(), file)
    return file


def scan(encoder: ImageEncoder, file: Path) -> Verdict:
    return Forensics(checkpoint=str(file)).scan(encoder, IMAGES.without_labels("forensics"), Seed(0))


def changed(norms: bool, others: bool) -> ImageEncoder:
    encoder = small_encoder()
    with torch.no_grad():
        for part in encoder.module.modules():
            if isinstance(part, torch.nn.BatchNorm2d) and norms:
                assert part.running_mean is not None
                part.running_mean += 1e-6
            if isinstance(part, torch.nn.Conv2d) and others:
                part.weight *= 1.5
    return encoder


def test_the_same_weights_are_clean(clean: Path) -> None:
    said = scan(small_encoder(), clean)
    assert (said.verdict, said.score) == ("clean-by-test", 0)
    assert said.details["relative_change"] == 0
    assert said.details["norm_equal"] == said.details["norm_tensors"] > 0


def test_other_weights_with_the_same_batchnorms_are_suspicious(clean: Path) -> None:
    encoder = changed(norms=False, others=True)
    before = model_print(encoder.module)
    said = scan(encoder, clean)
    assert (said.verdict, said.score, said.threshold) == ("suspicious", 1, 1)
    assert "was fine-tuned" in said.reason
    assert said.details["relative_change"] == pytest.approx(0.5, rel=0.1)
    assert model_print(encoder.module) == before


@pytest.mark.parametrize("others", [True, False])
def test_moved_statistics_are_no_such_sign(clean: Path, others: bool) -> None:
    said = scan(changed(norms=True, others=others), clean)
    assert said.verdict == "clean-by-test"
    assert 0 < said.score < said.threshold
    tensors = said.details["norm_tensors"]
    assert said.details["norm_equal"] == tensors * 3 / 4  # of mean, variance, weight and bias one has moved


def test_another_start_is_no_such_sign(clean: Path) -> None:
    said = scan(small_encoder(seed=1), clean)
    # untouched statistics are 0 and 1 in every fresh encoder: only a trained checkpoint tells anything
    assert said.details["other_equal"] < said.details["other_tensors"]


def test_errors(clean: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names no clean checkpoint; set `checkpoint`"):
        Forensics().scan(small_encoder(), IMAGES, Seed(0))
    with pytest.raises(CheckpointError, match="clean"):
        scan(small_encoder(width=4), clean)
    with pytest.raises(CheckpointError):
        scan(small_encoder(), tmp_path / "absent.safetensors")
    method = Forensics(checkpoint=str(clean))
    with pytest.raises(DataError, match="reads none"):
        method.scan(small_encoder(), IMAGES, Seed(0), Reference(method.name, "r", (0.5,) * 5))
    broken = small_encoder()
    with torch.no_grad():
        next(broken.module.parameters())[0] = float("nan")
    with pytest.raises(CupelError, match="NaN"):
        scan(broken, clean)


def test_few_images_are_inconclusive(clean: Path) -> None:
    few = IMAGES.subset(torch.arange(63))
    assert Forensics(checkpoint=str(clean)).scan(small_encoder(), few, Seed(0)).verdict == "inconclusive"


def test_settings(clean: Path) -> None:
    assert Forensics().name.startswith("forensics/")
    assert Forensics().name != Forensics(checkpoint=str(clean)).name
    with pytest.raises(UsageError, match="did you mean 'smoke'"):
        Forensics.preset("smok")
