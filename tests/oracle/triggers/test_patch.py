import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cupel.errors import DataError, SettingsError, UsageError
from cupel.lookup import data_roots, find_file
from cupel.seeds import Seed
from cupel.settings import parse
from cupel.triggers import TRIGGERS, Patch

PUBLISHED = {
    32: ("badencoder_refs/trigger/trigger_pt_white_21_10_ap_replace.npz", 300, slice(21, 31), 10),
    224: ("badencoder_refs/trigger/trigger_pt_white_173_50_ap_replace.npz", 7500, slice(173, 223), 50),
}


def images(n: int, side: int, top: int = 255) -> torch.Tensor:
    return torch.randint(0, top, (n, 3, side, side), dtype=torch.uint8, generator=Seed(side).torch())


def published(side: int) -> str:
    name = PUBLISHED[side][0]
    if not (Path(os.environ.get("CUPEL_DATA", "absent")) / name).is_file():
        pytest.skip("the published trigger files are not in CUPEL_DATA")
    return name


def write(path: Path, t: np.ndarray, tm: np.ndarray) -> str:
    np.savez(path, t=t, tm=tm)
    return str(path)


def square(k: int = 1, side: int = 8, value: float = 200.0) -> tuple[np.ndarray, np.ndarray]:
    t, tm = np.zeros((k, side, side, 3)), np.ones((k, side, side, 3), dtype=np.int64)
    for i in range(k):
        t[i, i : i + 2, 1:4] = value
        tm[i, i : i + 2, 1:4] = 0
    return t, tm


@pytest.mark.parametrize("side", [32, 224])
def test_published_file_sets_exactly_the_square_to_white(side: int) -> None:
    _, count, place, size = PUBLISHED[side]
    x = images(2, side)  # no 255 in it
    before = x.clone()
    y = Patch(file=published(side))(x, [0, 1], Seed(0))
    assert torch.equal(x, before)
    assert y.dtype == torch.uint8
    changed = y != x
    assert changed.flatten(1).sum(dim=1).tolist() == [count, count]
    assert (y[changed] == 255).all()
    assert changed[:, :, place, place].all()
    assert torch.equal(y, Patch(size=size)(x, [0, 1], Seed(0)))


def test_published_file_is_x_times_tm_plus_t() -> None:
    x = images(3, 32, 256)
    with np.load(find_file(published(32))) as file:
        expected = x.permute(0, 2, 3, 1).numpy() * file["tm"] + file["t"]
    y = Patch(file=published(32))(x, [0, 1, 2], Seed(0))
    assert np.array_equal(y.permute(0, 2, 3, 1).numpy(), expected)


def test_index_chooses_among_several_triggers(tmp_path: Path) -> None:
    name = write(tmp_path / "two.npz", *square(k=2))
    x = images(1, 8)
    for index in (0, 1):
        y = Patch(file=name, index=index)(x, [5], Seed(0))
        changed = (y != x).any(dim=1)[0].nonzero()
        assert changed.min(dim=0).values.tolist() == [index, 1]
        assert changed.max(dim=0).values.tolist() == [index + 1, 3]
        assert (y[0, :, index, 1] == 200).all()
    with pytest.raises(UsageError, match=r"two\.npz: holds 2 trigger"):
        Patch(file=name, index=2)(x, [5], Seed(0))


def broken_files() -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    t, tm = square()
    halves = tm.astype(float)
    halves[0, 0, 0] = 0.5
    too_bright, nan = t.copy(), t.copy()
    too_bright[0, 0, 1], nan[0, 0, 1] = 256, np.nan
    black, mostly = np.zeros_like(t), 1 - tm
    return {
        "inverted": (t, 1 - tm, "inverted"),
        "inverted black": (black, mostly, "inverted"),
        "no K axis": (t[0], tm[0], "first axis"),
        "shapes": (t, tm[:, 1:], "differ in shape"),
        "channels first": (t.transpose(0, 3, 1, 2), tm.transpose(0, 3, 1, 2), r"\[triggers, height, width, 3\]"),
        "mask values": (t, halves, "other values"),
        "too bright": (too_bright, tm, "0–255"),
        "nan": (nan, tm, "0–255"),
        "empty mask": (black, np.ones_like(tm), "nothing"),
        "text": (t.astype(str), tm, "numbers"),
    }


@pytest.mark.parametrize("case", broken_files())
def test_wrong_arrays_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    t, tm, message = broken_files()[case]
    name = write(tmp_path / "bad.npz", t, tm)
    with pytest.raises(DataError, match=message) as caught:
        Patch(file=name)(images(1, 8), [0], Seed(0))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(name)


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.abort, ())


def test_broken_files_are_refused_and_nothing_is_unpickled(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.savez_compressed(whole, **dict(zip(("t", "tm"), square(), strict=True)))
    objects = io.BytesIO()
    np.savez(objects, t=np.array([_Bomb()], dtype=object), tm=square()[1])
    short = io.BytesIO()
    with zipfile.ZipFile(short, "w") as archive:
        archive.writestr("t.npy", b"\x93NUMPY\x01\x00")
        archive.writestr("tm.npy", b"")
    lacking = io.BytesIO()
    np.savez(lacking, t=square()[0])
    contents = {
        "truncated": whole.getvalue()[:-40],
        "pickle": pickle.dumps(_Bomb()),
        "object array": objects.getvalue(),
        "empty": b"",
        "text": b"not an archive",
        "short members": short.getvalue(),
        "no tm": lacking.getvalue(),
    }
    for case, content in contents.items():
        path = tmp_path / f"{case}.npz"
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            Patch(file=str(path))(images(1, 8), [0], Seed(0))
        assert "\n" not in str(caught.value)


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    x = images(1, 8)
    name = write(tmp_path / "t.npz", *square(value=200.0))
    assert (Patch(file=name)(x, [0], Seed(0))[0, :, 0, 1] == 200).all()
    t, tm = square(value=100.0)
    np.savez_compressed(name, t=t, tm=tm)
    assert (Patch(file=name)(x, [0], Seed(0))[0, :, 0, 1] == 100).all()


def test_sizes_that_do_not_fit_name_both() -> None:
    with pytest.raises(UsageError, match=r"32 px with a margin of 1 px does not fit into images of 32 × 32 px"):
        Patch(size=32)(images(1, 32), [0], Seed(0))
    assert (Patch(size=32, margin=0)(images(1, 32), [0], Seed(0)) == 255).all()
    with pytest.raises(UsageError, match=r"images of 32 × 32 px, not 16 × 16 px"):
        Patch(file=published(32))(images(1, 16), [0], Seed(0))


@pytest.mark.parametrize(
    ("corner", "rows", "columns"),
    [
        ("top_left", slice(2, 5), slice(2, 5)),
        ("top_right", slice(2, 5), slice(7, 10)),
        ("bottom_left", slice(5, 8), slice(2, 5)),
        ("bottom_right", slice(5, 8), slice(7, 10)),
    ],
)
def test_corners_on_a_wide_image(corner: str, rows: slice, columns: slice) -> None:
    x = torch.full((2, 3, 10, 12), 7, dtype=torch.uint8)
    y = Patch(size=3, margin=2, corner=corner, color=(10, 20, 30))(x, [0, 1], Seed(0))
    expected = x.clone()
    expected[:, :, rows, columns] = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1)
    assert torch.equal(y, expected)


def test_checker_holds_black_and_white() -> None:
    y = Patch(size=8, margin=0, color="checker")(torch.full((1, 3, 8, 8), 7, dtype=torch.uint8), [0], Seed(0))
    assert y[0, 0, :4, :4].tolist() == [[255, 255, 0, 0], [255, 255, 0, 0], [0, 0, 255, 255], [0, 0, 255, 255]]


def test_mask_and_pattern_rebuild_the_triggered_image(tmp_path: Path) -> None:
    name = write(tmp_path / "t.npz", *square())
    for patch in (Patch(size=3, color="red"), Patch(file=name)):
        x = images(1, 8)
        mask, pattern = patch.mask_and_pattern(8)
        assert mask.dtype == torch.float32
        assert pattern.dtype == torch.uint8
        assert mask.shape == (8, 8)
        rebuilt = x * (1 - mask) + pattern * mask
        assert torch.equal(rebuilt, patch(x, [0], Seed(0)).float())


def test_wrong_settings_and_wrong_calls() -> None:
    for wrong in ({"size": 0}, {"margin": -1}, {"corner": "middle"}, {"color": "pink"}, {"color": (1, 2, 256)}):
        with pytest.raises(SettingsError):
            Patch(**wrong)
    assert parse(Patch, {"color": [1, 2, 3]}, "exp.yaml").color == (1, 2, 3)
    with pytest.raises(TypeError):
        Patch()(torch.rand(1, 3, 32, 32), [0], Seed(0))
    with pytest.raises(ValueError, match="2 images, but 1 ids"):
        Patch()(images(2, 32), [0], Seed(0))


def test_lookup_order_and_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_roots() == [tmp_path / "named", Path("data"), tmp_path / "cache/cupel/data"]
    places = [tmp_path / "cache/cupel/data", tmp_path / "data", tmp_path / "named", tmp_path]
    with pytest.raises(DataError, match=r"sub/t\.npz: no such file \(looked in .*named.*data.*cache"):
        find_file("sub/t.npz")
    for place in places:  # each is searched before those tried so far
        (place / "sub").mkdir(parents=True)
        (place / "sub/t.npz").write_bytes(b"")
        assert find_file("sub/t.npz").resolve() == (place / "sub/t.npz").resolve()
    with pytest.raises(DataError, match="is a folder"):
        find_file(tmp_path / "sub")
    with pytest.raises(DataError, match="empty"):
        find_file("")
    monkeypatch.delenv("CUPEL_DATA")
    assert data_roots()[0] == Path("data")


def test_the_table_lists_all() -> None:
    assert set(TRIGGERS) >= {"patch", "blend", "random_patch"}
