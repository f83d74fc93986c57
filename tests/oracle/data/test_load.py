"""Every kind of source gives the same images, labels and ids; every bad one gives one line and its exit code."""

from __future__ import annotations

import io
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cupel import data
from cupel.data import memory, official
from cupel.errors import CupelError, DataError, MissingExtra, UsageError
from cupel.progress import reporting
from cupel.seeds import Seed

SIDE = 12
PICTURES = np.random.default_rng(3).integers(0, 256, (9, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = [0, 0, 0, 1, 1, 1, 2, 2, 2]
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Look only inside the test's own folders."""
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path / "root"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "root"


def png(picture: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, pictures: Any = PICTURES, labels: Any = LABELS, names: Any = CLASSES) -> Path:
    blobs = [p if isinstance(p, bytes | None) else png(p) for p in pictures]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": b, "path": f"train/{k}.png"} for k, b in enumerate(blobs)], type=kind)
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table({"image": rows, "label": pa.array(labels, pa.int64())})
    described = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(described), path)
    return path


def write_folder(path: Path, classes: bool = True) -> Path:
    for k, (picture, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        file = path / CLASSES[label] / f"{k}.png" if classes else path / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(picture))
    return path


def refused(source: object, kind: type[CupelError] = DataError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        data.load(str(source), **options)
    assert caught.value.exit_code == (4 if kind in (UsageError, MissingExtra) else 2)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(found: data.Dataset, labels: list[int] | None = LABELS, classes: list[str] = CLASSES) -> None:
    assert torch.equal(found.inputs[:], torch.from_numpy(PICTURES).permute(0, 3, 1, 2))
    assert found.labels.tolist() == (labels or [-1] * 9)
    assert found.ids.tolist() == list(range(9))
    assert list(found.classes) == classes


# sources


def test_folder_with_classes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures")
    (folder / "ant" / "notes.txt").write_text("not an image")
    (folder / ".hidden").mkdir()
    (folder / "empty").mkdir()
    same(data.load(folder))
    same(data.load("pictures"))


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    same(data.load(write_folder(tmp_path / "flat", classes=False)), None, [])


def test_folder_with_splits(tmp_path: Path) -> None:
    write_folder(tmp_path / "both" / "train")
    write_folder(tmp_path / "both" / "val")
    assert data.splits_of("both") == ("train", "validation")
    same(data.load("both", split="validation"))
    assert "has no split 'test' (it has: train, validation)" in refused("both", split="test")


def test_odd_file_names(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ("naïve.PNG", "two words.png", "new\nline.png"):
        (folder / name).write_bytes(png(PICTURES[0]))
    assert len(data.load(folder)) == 3


def test_parquet_file_and_folder(tmp_path: Path, roots: Path) -> None:
    same(data.load(write_parquet(tmp_path / "some.parquet")))
    write_parquet(roots / "cifar10" / "train-00000-of-00002.parquet", PICTURES[:5], LABELS[:5])
    write_parquet(roots / "cifar10" / "train-00001-of-00002.parquet", PICTURES[5:], LABELS[5:])
    write_parquet(roots / "cifar10" / "test-00000-of-00001.parquet", PICTURES[:2], LABELS[:2])
    assert data.splits_of("cifar10") == ("train", "test")
    same(data.load("cifar10"))
    assert len(data.load("cifar10", split="test")) == 2
    assert data.load("cifar10").name == "cifar10"


def test_parquet_without_metadata_and_with_strings(tmp_path: Path) -> None:
    table = pa.table({"img": [png(p) for p in PICTURES], "label": ["bee"] * 4 + [None] + ["ant"] * 4})
    pq.write_table(table, tmp_path / "plain.parquet")
    same(data.load("plain.parquet"), [1] * 4 + [-1] + [0] * 4, ["ant", "bee"])


def test_labels_may_be_missing_in_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(p) for p in PICTURES]}), tmp_path / "bare.parquet")
    same(data.load("bare.parquet"), None, [])


@pytest.mark.parametrize("keys", [("x", "y"), ("images", "labels")])
def test_npz(tmp_path: Path, keys: tuple[str, str]) -> None:
    np.savez(tmp_path / "a.npz", **{keys[0]: PICTURES, keys[1]: np.array(LABELS)})
    same(data.load("a.npz"), classes=[])


def test_grey_npz_gets_equal_channels(tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", x=PICTURES[..., 0])
    found = data.load("grey.npz")
    assert torch.equal(found.inputs[:, 0], found.inputs[:, 2])
    assert found.labels.tolist() == [-1] * 9


def test_lookup_order(tmp_path: Path, roots: Path) -> None:
    write_parquet(tmp_path / "cache" / "cupel" / "data" / "cifar10" / "train.parquet", PICTURES[:1], [0])
    assert len(data.load("cifar10")) == 1
    write_parquet(tmp_path / "data" / "cifar10" / "train.parquet", PICTURES[:2], [0, 0])
    assert len(data.load("cifar10")) == 2
    write_parquet(roots / "cifar10" / "train.parquet", PICTURES[:3], [0, 0, 0])
    assert len(data.load("cifar10")) == 3
    write_parquet(roots / "mine" / "train.parquet", PICTURES[:4], [0, 0, 0, 0])
    assert len(data.load("mine")) == 4
    assert data.find_file("mine/train.parquet") == roots / "mine" / "train.parquet"


class _Fake:
    """What torchvision's class would be; the arrays of the official layouts."""

    here: Path | None = None

    def __init__(self, root: str, download: bool, train: bool = True, split: str = "train") -> None:
        if download and _Fake.here is None:
            raise OSError("<urlopen error no network>")
        if Path(root) != _Fake.here and not download:
            raise RuntimeError("Dataset not found or corrupted.")
        self.data: Any = PICTURES.transpose(0, 3, 1, 2) if split == "unlabeled" else PICTURES
        self.targets, self.classes = LABELS, CLASSES
        self.labels = np.full(9, -1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Fake]]:
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", _Fake)
    monkeypatch.setattr(torchvision.datasets, "STL10", _Fake)
    _Fake.here = None
    yield _Fake
    _Fake.here = None


def test_official_layout_in_a_root(fake: type[_Fake], roots: Path) -> None:
    (roots / "cifar10").mkdir(parents=True)
    (roots / "cifar10" / "batch").write_bytes(b"1")
    fake.here = roots / "cifar10"
    same(data.load("cifar10"))
    first = data.fingerprint("cifar10", "train")
    assert first != data.fingerprint("cifar10", "test")
    (roots / "cifar10" / "batch").write_bytes(b"22")
    assert data.fingerprint("cifar10", "train") != first


def test_official_arrays_with_the_channel_first(fake: type[_Fake], roots: Path) -> None:
    (roots / "stl10").mkdir(parents=True)
    fake.here = roots / "stl10"
    same(data.load("stl10", split="unlabeled"), None)


def test_download_goes_to_the_user_cache(fake: type[_Fake], tmp_path: Path) -> None:
    fake.here = tmp_path / "cache" / "cupel" / "data" / "cifar10"
    same(data.load("cifar10"))
    assert fake.here.is_dir()


def test_no_network_says_what_to_do(fake: type[_Fake]) -> None:
    line = refused("cifar10")
    assert "not on this machine" in line
    assert "no network" in line
    assert f"put Parquet files or a folder of images into {os.environ['CUPEL_DATA']}/cifar10" in line
    assert "has no official download" in refused("tinyimagenet")
    assert "has no split 'validation'" in refused("cifar10", split="validation")


def test_real_cifar_pickles_are_not_read_before_their_sums(roots: Path) -> None:
    """A pickle that would create a file, in the official place: torchvision's MD5 check must stop it."""
    folder = roots / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    marker = roots / "executed"
    hostile = f"cos\nmkdir\n(V{marker}\ntR.".encode()
    for name in ("test_batch", "batches.meta", *(f"data_batch_{k}" for k in range(1, 6))):
        (folder / name).write_bytes(hostile)
    assert not official.has_official("cifar10", roots / "cifar10", "train")
    with pytest.raises(DataError, match="no whole copy"):
        official.read_official("cifar10", roots / "cifar10", "train")
    assert not marker.exists()


def test_old_mnist_files_are_refused(roots: Path) -> None:
    (roots / "mnist" / "MNIST" / "processed").mkdir(parents=True)
    assert "old torchvision versions" in refused("mnist")


# the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    datasets = pytest.importorskip("datasets")
    rows = [{"bytes": png(p), "path": None} for p in PICTURES]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    made = datasets.Dataset.from_dict({"img": rows, "label": LABELS}, features=features)

    def load_dataset(source: str, configuration: str | None, split: str) -> Any:
        assert source == "someone/some"
        if split != "train":
            raise ValueError(f'Unknown split "{split}". Should be one of [train].\nmore')
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return datasets


def test_hub(hub: types.ModuleType) -> None:
    same(data.load("hf:someone/some"))
    assert 'Unknown split "dev"' in refused("hf:someone/some", split="dev")
    assert len(data.fingerprint("hf:someone/some")) == 64
    assert "names no data set" in refused("hf:")


def test_hub_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'cupel[hub]'" in refused("hf:someone/some", MissingExtra)


# size, limit, memory


def test_size_and_native_size(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures")
    small = data.load(folder, size=5).inputs[4]
    expected = np.asarray(Image.fromarray(PICTURES[4]).resize((5, 5), Image.Resampling.BILINEAR))
    assert (small.permute(1, 2, 0).numpy() == expected).all()
    (folder / "cat" / "99.png").write_bytes(png(PICTURES[0][:6]))
    assert "99.png: is 12 x 6 pixels, the first image 12 x 12; give a size" in refused(folder)
    assert len(data.load(folder, size=5)) == 10


def test_limit_is_balanced_seeded_and_keeps_row_numbers(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    draws = [data.load("a.parquet", limit=6, seed=Seed(s)) for s in range(8)]
    for drawn in draws:
        assert drawn.labels.bincount().tolist() == [2, 2, 2]
        assert torch.equal(drawn.inputs, torch.from_numpy(PICTURES).permute(0, 3, 1, 2)[drawn.ids])
    assert len({tuple(drawn.ids.tolist()) for drawn in draws}) > 1
    assert draws[0].ids.tolist() == data.load("a.parquet", limit=6).ids.tolist()
    assert len(data.load("a.parquet", limit=99)) == 9


def test_limit_where_classes_are_too_small_for_equal_shares() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 50)
    rows = memory.balanced(labels, 23, np.random.default_rng(0))
    assert labels[rows].bincount().tolist() == [10, 3, 10]
    assert len(memory.balanced(torch.full((10,), -1), 4, np.random.default_rng(0)).unique()) == 4


def test_lazy_images_equal_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "pictures")
    whole = {size: data.load(folder, size=size) for size in (None, 7)}
    monkeypatch.setattr(memory, "_IN_MEMORY", 100)
    for size, eager in whole.items():
        lazy = data.load(folder, size=size)
        assert isinstance(lazy.inputs, data.LazyImages)
        assert tuple(lazy.inputs.shape) == tuple(eager.inputs.shape)
        assert isinstance(eager.inputs, torch.Tensor)
        for rows in (
            slice(2, 5),
            torch.tensor([7, 0, 7]),
            torch.arange(9) % 2 == 0,
            [3],
            4,
            torch.tensor([], dtype=torch.long),
        ):
            assert torch.equal(lazy.inputs[rows], eager.inputs[rows])
        part = lazy.subset(torch.tensor([8, 1]))
        assert torch.equal(part.inputs[torch.tensor([1])], eager.inputs[1:2])
        assert len(set(lazy.content())) == 9
        with pytest.raises(DataError, match="share 2 images"):
            data.check_disjoint(lazy=part, eager=eager)
    (folder / "cat" / "99.png").write_bytes(png(PICTURES[0][:6]))
    assert "is 12 x 6 pixels" in refused(folder)


# bad input


class _Listener:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def track(self, label: str, total: int) -> Any:
        raise AssertionError("a small set needs no bar")


@pytest.mark.parametrize("lazy", [False, True])
def test_bad_images_stop_or_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool) -> None:
    if lazy:
        monkeypatch.setattr(memory, "_IN_MEMORY", 100)
    pictures = [png(PICTURES[0])] * 40
    pictures[0] = b"<html>404</html>"
    pictures[7] = png(PICTURES[1])[:200]
    path = write_parquet(tmp_path / "a.parquet", pictures, [0] * 40)
    if lazy:
        with pytest.raises(DataError, match=r"a\.parquet row 7: is cut off"):
            data.load(path, size=8).inputs[5:10]
    else:
        assert "a.parquet row 0: is an HTML or XML page" in refused(path)
    listener = _Listener()
    with reporting(listener):
        found = data.load(path, on_bad="skip", size=8)
    assert found.ids.tolist() == [k for k in range(40) if k not in (0, 7)]
    assert len(found.inputs[:]) == 38
    assert len(listener.said) == 1
    assert "2 of 40 images skipped" in listener.said[0]
    pictures[8] = b""
    write_parquet(path, pictures, [0] * 40)
    assert "3 of 40 images cannot be read" in refused(path, on_bad="skip", size=8)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures")
    (folder / "bee" / "4.png").write_bytes(b"")
    assert "pictures/bee/4.png: is empty; repair or remove it" in refused(folder)


def test_row_without_bytes(tmp_path: Path) -> None:
    """A table may name files beside it; those are not opened."""
    path = write_parquet(tmp_path / "a.parquet", [None, *PICTURES[1:]])
    assert "row 0: holds no image bytes" in refused(path)


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "zero").write_bytes(b"")
    (tmp_path / "one.png").write_bytes(png(PICTURES[0]))
    assert "holds no images" in refused("empty")
    assert "holds no images" in refused("texts")
    assert "neither a Parquet file nor an .npz file" in refused("a.txt")
    assert "is empty" in refused("zero")
    assert "give the folder it lies in" in refused("one.png")
    assert "no such file or folder" in refused("nowhere/at.parquet")
    assert "did you mean 'cifar10'?" in refused("cifar1O", UsageError)
    assert "is empty" in refused("", UsageError)
    assert "limit of 0" in refused("one.png", UsageError, limit=0)
    assert "resized to 0" in refused("one.png", UsageError, size=0)


def test_bad_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "cut.parquet")
    path.write_bytes(path.read_bytes()[:-40])
    assert "no readable Parquet file" in refused("cut.parquet")
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "text.parquet")
    assert "holds no images (columns: text, label)" in refused("text.parquet")
    assert "names only 2 classes" in refused(write_parquet(tmp_path / "many.parquet", names=["a", "b"]))
    assert "has the label -2" in refused(write_parquet(tmp_path / "low.parquet", labels=[-2] * 9))
    assert "holds no images" in refused(write_parquet(tmp_path / "none.parquet", [], []))


def test_bad_npz(tmp_path: Path) -> None:
    def saved(**arrays: Any) -> Path:
        np.savez(tmp_path / "a.npz", **arrays)
        return tmp_path / "a.npz"

    assert "has no array `x` (it has: z)" in refused(saved(z=PICTURES))
    assert "must be uint8, got float32" in refused(saved(x=PICTURES.astype(np.float32)))
    assert "channel first" in refused(saved(x=PICTURES.transpose(0, 3, 1, 2)))
    assert "must be [n, height, width, 3]" in refused(saved(x=PICTURES.reshape(9, -1)))
    assert "labels must be 9 integers" in refused(saved(x=PICTURES, y=np.arange(4)))
    assert "holds no images" in refused(saved(x=PICTURES[:0]))
    assert "no readable .npz" in refused(saved(x=np.array([{}], dtype=object)))  # would need unpickling
    whole = saved(x=PICTURES).read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    assert "no readable .npz" in refused("a.npz")


# fingerprint


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    first, second = write_folder(tmp_path / "one"), write_folder(tmp_path / "two")
    assert data.fingerprint(str(first)) == data.fingerprint("two")
    before = data.fingerprint("two")
    (second / "ant" / "0.png").rename(second / "bee" / "0.png")  # same pixels, another label
    moved = data.fingerprint("two")
    assert moved != before
    (second / "bee" / "0.png").write_bytes(png(PICTURES[1]) + b" ")
    assert data.fingerprint("two") not in (before, moved)


def test_fingerprint_of_embedded_data() -> None:
    prints = {data.fingerprint(name, split) for name in ("digits", "shapes") for split in ("train", "test")}
    assert len(prints) == 4
    with pytest.raises(DataError, match="has no split"):
        data.fingerprint("digits", "validation")


def test_tracks(tmp_path: Path) -> None:
    for name in ("3/00000_00000", "3/00000_00003", "3/00001_00000", "4/00000_00000"):
        file = tmp_path / "signs" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(PICTURES[0]))
    groups = data.tracks("signs")
    assert groups is not None
    assert groups.tolist() == [0, 0, 1, 2]
    assert data.tracks("digits") is None
