"""`cupel purify` with and without labels: what it refuses, what it writes, and that the given file stays as it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupel.checkpoint import inspect_file
from cupel.cli import main
from cupel.encoders.storage import load_encoder, save_encoder
from cupel.purify import PURIFIERS, label_free
from cupel.verdicts import Verdict
from fingerprints import same_state
from toys import blobs, trained_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, labelled images, and the same without labels."""
    root, data = tmp_path_factory.mktemp("purify"), blobs(64)
    pixels, labels = np.asarray(data.inputs).transpose(0, 2, 3, 1), data.labels.numpy()
    np.savez(root / "labelled.npz", x=pixels, y=labels)
    np.savez(root / "plain.npz", x=pixels)
    np.savez(root / "partly.npz", x=pixels, y=np.where(np.arange(64) < 3, -1, labels))
    save_encoder(trained_encoder(data, steps=20), root / "encoder.safetensors")
    return root


@pytest.fixture
def quick_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scanners are tested elsewhere: here they find nothing."""
    nothing = Verdict("clean-by-test", 0.0, 1.0, tested="nothing", reason="nothing stood out")
    monkeypatch.setattr("cupel.vet.chain.scan_encoder", lambda *_: (nothing, [("none", nothing)]))


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    return int(stop.value.code or 0)


def purify(root: Path, out: Path, *more: object, images: str = "plain.npz") -> int:
    given = [root / "encoder.safetensors", "--images", root / images, "--budget", "smoke", "--out", out]
    return call("purify", *given, *more)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--purifier", "fst"], 4, "'fst' needs labels; give labelled images by --labels, or choose a label-free"),
        (["--purifier", "abl"], 4, "needs labels"),
        (["--purifier", "neural_cleanse_prune"], 4, "label-free purifier: " + ", ".join(label_free())),
        (["--purifier", "fsst"], 4, "did you mean 'fst'"),
        (["--purifier", "neural_cleans_prune"], 4, "did you mean 'neural_cleanse_prune'"),
        (["--purifier", "cbd", "--labels", "{root}/labelled.npz"], 4, "'cbd' reads no labels"),
        (["--purifier", "fst", "--labels", "{root}/plain.npz"], 2, "64 of 64 images have no label"),
        (["--purifier", "fst", "--labels", "{root}/partly.npz"], 2, "3 of 64 images have no label"),
        (["--purifier", "fst", "--labels", "{root}/nowhere.npz"], 2, "nowhere.npz"),
        (["--purifier", "fst", "--labels", "{root}/labelled.npz", "--set", "alhpa=1"], 4, "did you mean 'alpha'"),
        (["--purifier", "fst", "--set", "alpha=-1"], 4, "alpha"),
        (["--set", "batch_size=1"], 4, "batch_size"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_scan: None,
    more: list[str], code: int, words: str,
) -> None:  # fmt: skip
    before = hashlib.sha256((folder / "encoder.safetensors").read_bytes()).hexdigest()
    assert purify(folder, tmp_path / "out.safetensors", *(one.format(root=folder) for one in more)) == code
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cupel: ")]
    assert len(said) == 1
    assert words in said[0]
    assert list(tmp_path.iterdir()) == []
    assert hashlib.sha256((folder / "encoder.safetensors").read_bytes()).hexdigest() == before


def test_the_given_file_is_no_place_for_the_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "encoder.safetensors").read_bytes()
    assert purify(folder, folder / "encoder.safetensors") == 4
    assert "is the encoder itself" in capsys.readouterr().err
    assert (folder / "encoder.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("fst", ["--labels", "{root}/labelled.npz", "--set", "steps=4"]),
        ("neural_cleanse_unlearn", ["--labels", "{root}/labelled.npz", "--set", "steps=4", "--set", "num_triggers=2"]),
        ("bcu", ["--set", "steps=4", "--set", "rates=[0.5]"]),
        ("clp", ["--set", "u=0.5"]),
    ],
)
def test_a_purified_encoder_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_scan: None, name: str, more: list[str]
) -> None:
    out = tmp_path / "out.safetensors"
    assert purify(folder, out, "--purifier", name, *(one.format(root=folder) for one in more)) == 0
    said = capsys.readouterr().out
    method: Any = PURIFIERS[name]
    assert ("labels    64 images of" in said) == ("labels" in method.needs)
    made, given = load_encoder(out), load_encoder(folder / "encoder.safetensors")
    assert not same_state(made.module, given.module)
    assert made.card.source["purified_with"] == PURIFIERS[name].__name__
    assert inspect_file(out)
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["command"] == "purify"
    assert set(record["verdicts"]) == {"scanned", "purified"}
    cost = record["extra"]["defences"][f"purify {name}"]
    assert cost["images"] == 64
    assert (cost["forward_images"] > 0) == (name != "clp")  # it looks at no image
    assert cost["peak_memory_mib"] is None or cost["peak_memory_mib"] > 50
    assert f"cost      {cost['forward_images']:,} images forward" in said


def test_a_purification_that_fails_leaves_no_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_scan: None
) -> None:
    assert purify(folder, tmp_path / "out.safetensors", "--set", "lr=1e9", "--set", "steps=60") == 2
    said = capsys.readouterr().err
    assert "the loss is not finite" in said or "collapse" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_fewer_images_than_a_batch_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_scan: None
) -> None:
    np.savez(tmp_path / "few.npz", x=np.zeros((10, 16, 16, 3), np.uint8))
    assert purify(folder, tmp_path / "out.safetensors", images=str(tmp_path / "few.npz")) == 2
    assert "one batch needs 48" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", ["cupellation", "bcu", "cbd"])
def test_images_that_are_all_alike_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_scan: None, name: str
) -> None:
    """A camera with its cap on: no result, no half of a file, and the given encoder as it was."""
    before = (folder / "encoder.safetensors").read_bytes()
    np.savez(tmp_path / "dark.npz", x=np.zeros((64, 16, 16, 3), np.uint8))
    more = ["--purifier", name, "--set", "steps=3"]
    assert purify(folder, tmp_path / "out.safetensors", *more, images=str(tmp_path / "dark.npz")) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cupel: ")]
    assert len(said) == 1
    assert "all look alike" in said[0] or "not finite" in said[0]
    assert [one.name for one in tmp_path.iterdir()] == ["dark.npz"]
    assert (folder / "encoder.safetensors").read_bytes() == before
