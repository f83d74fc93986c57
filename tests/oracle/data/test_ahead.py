"""Reading ahead: the pixels, order and errors of plain indexing, with bounded memory and no thread left behind."""

from __future__ import annotations

import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from cupel import progress
from cupel.data.ahead import ahead
from cupel.data.decode import quiet_pillow
from cupel.data.memory import LazyImages
from cupel.data.stored import Files
from cupel.encoders import Fast
from cupel.errors import DataError, Interrupted
from cupel.pretrain import SimCLR, pretrain_encoder
from cupel.seeds import Seed
from cupel.types import Dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 photographs, so to speak: 120 x 100 pixels, JPEG."""
    root, random = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    for k in range(24):
        coarse = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8))
        coarse.resize((120, 100), Image.Resampling.BICUBIC).save(root / f"{k:02}.jpg", quality=90)
    return root


def lazy(folder, size: int = 32) -> LazyImages:
    paths = sorted(folder.glob("*.jpg"))
    return LazyImages(Files(paths), torch.arange(len(paths)), (size, size), resize=True)


def reading() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cupel-ahead")]


class Counted:
    """Pixels that count how many of the batches they gave are still alive, and note who asked."""

    def __init__(self, n: int = 40, bad: int | None = None) -> None:
        self.values, self.bad = torch.arange(n, dtype=torch.uint8), bad
        self.alive, self.most, self.asked = weakref.WeakSet[object](), 0, list[list[int]]()
        self.threads = set[str]()

    @property
    def shape(self):
        return (len(self.values), 3, 2, 2)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        self.asked.append(rows.tolist())
        self.threads.add(threading.current_thread().name)
        if self.bad is not None and self.bad in rows.tolist():
            raise DataError(f"row {self.bad}", "is damaged")
        made = self.values[rows].reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2).clone()
        self.alive.add(made)
        self.most = max(self.most, len(self.alive))
        return made

    def content(self):
        return [bytes([v]) for v in self.values.tolist()]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_pixels_and_order_are_those_of_indexing(folder, depth):
    images = lazy(folder)
    batches = list(torch.randperm(24, generator=Seed(1).torch()).split(7))
    with ahead(images, batches, "cpu", depth=depth) as read:
        got = list(read)
    assert [rows.tolist() for rows, _ in got] == [rows.tolist() for rows in batches]
    for rows, pixels in got:
        assert torch.equal(pixels, images[rows])
    assert not reading()


def test_slices_and_subsets(folder):
    data = Dataset(lazy(folder), torch.zeros(24, dtype=torch.int64), torch.arange(24)).subset(torch.arange(23, -1, -2))
    with ahead(data.inputs, [slice(0, 5), slice(5, 12)], "cpu") as read:
        assert torch.equal(torch.cat([pixels for _, pixels in read]), lazy(folder)[torch.arange(23, -1, -2)])


def test_one_tensor_needs_no_thread():
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(10, 3, 1, 1)
    with ahead(images, [torch.tensor([3, 1]), torch.tensor([9])], "cpu") as read:
        next(read)
        assert not reading()
        assert next(read)[1].flatten().tolist() == [9, 9, 9]
        with pytest.raises(StopIteration):
            next(read)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_memory_is_bounded(depth):
    images = Counted()
    with ahead(images, torch.arange(40).split(2), "cpu", depth=depth) as read:
        for rows, pixels in read:  # `pixels` stays bound until the next batch has come, as in every loop
            assert pixels[:, 0, 0, 0].tolist() == rows.tolist()
    assert len(images.asked) == 20
    assert images.most <= depth + 1
    assert len(images.threads) == 1
    assert "cupel-ahead" in images.threads.pop()


def test_next_batches_are_read_while_one_is_used():
    asked = threading.Event()

    class Noticing(Counted):
        def __getitem__(self, rows):
            if 3 in rows.tolist():
                asked.set()
            return super().__getitem__(rows)

    with ahead(Noticing(), torch.arange(8).split(1), "cpu", depth=2) as read:
        next(read)
        next(read)  # by now batches 0 to 2 were handed to the reader
        assert not asked.is_set()
        next(read)  # now also batch 3, which nobody has asked for
        assert asked.wait(30)


def test_error_comes_with_its_batch():
    images = Counted(bad=5)
    seen = []
    with ahead(images, torch.arange(12).split(2), "cpu", depth=3) as read:
        for _ in range(2):
            seen.append(next(read)[0].tolist())
        with pytest.raises(DataError, match="row 5"):
            next(read)
    assert seen == [[0, 1], [2, 3]]
    assert not reading()


def test_file_that_is_cut_off_is_named(folder, tmp_path):
    for k, path in enumerate(sorted(folder.glob("*.jpg"))):
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[: len(data) // 2] if k == 9 else data)
    with ahead(lazy(tmp_path), torch.arange(24).split(8), "cpu") as read:
        assert next(read)[0].tolist() == list(range(8))
        with pytest.raises(DataError, match=r"09\.jpg"):
            next(read)


def test_stopping_early_ends_the_thread():
    images = Counted()

    def consume():
        with ahead(images, torch.arange(40).split(1), "cpu") as read:
            for rows, _ in read:
                assert reading()
                if int(rows) == 3:
                    raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough") as caught:
        consume()
    assert caught.tb is not None  # the frames are still alive: it is not garbage collection that ended the thread
    assert not reading()
    assert len(images.asked) <= 6  # batches 0 to 3 and the two ahead


def test_filters_of_warnings_are_put_back(folder):
    before = list(warnings.filters)
    with ahead(lazy(folder), torch.arange(24).split(4), "cpu") as read:
        for _ in read:
            pass
    assert warnings.filters == before


def test_quiet_inside_quiet_leaves_the_filters_to_the_outer():
    with quiet_pillow():
        outer = list(warnings.filters)
        thread = threading.Thread(target=lambda: quiet_pillow().__enter__())  # never left, as one that is still busy
        thread.start()
        thread.join()
        assert warnings.filters == outer


def test_depth_is_checked():
    with pytest.raises(ValueError, match="depth"), ahead(Counted(), [], "cpu", depth=0):
        pass


def trained(inputs, path, stop_at: int | None = None):
    data = Dataset(inputs, torch.full((24,), -1), torch.arange(24), "photographs")
    seen = []

    def watch(encoder):
        seen.append(1)
        if len(seen) == stop_at:
            progress.request_stop(2)
        return {"seen": 1.0}

    objective = SimCLR(steps=7, batch_size=8, lr=1e-3)
    made, history = pretrain_encoder(
        objective, Fast(width=4, input_size=32), data, Seed(3), checkpoint=path, watch=watch, watch_every=1
    )
    return made.module.state_dict(), history["loss"]


def test_training_on_files_equals_training_in_memory_also_when_resumed(folder, tmp_path):
    images = lazy(folder)
    weights, losses = trained(images[torch.arange(24)], tmp_path / "memory")
    read, again = trained(images, tmp_path / "files")
    try:
        with pytest.raises(Interrupted):
            trained(images, tmp_path / "resumed", stop_at=4)  # in the second of three-step epochs
    finally:
        progress.request_stop(None)
    assert not reading()
    resumed, once_more = trained(images, tmp_path / "resumed")
    assert losses == again == once_more
    for name, value in weights.items():
        assert torch.equal(value, read[name]), name
        assert torch.equal(value, resumed[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a CUDA device are tested, there is none")
@pytest.mark.parametrize("room", [True, False])
def test_batches_on_cuda(monkeypatch, room):
    images = torch.arange(40, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    if not room:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    for source in (images, Counted()):
        with ahead(source, torch.arange(39, -1, -1).split(7), "cuda") as read:
            got = [pixels for _, pixels in read]
        assert all(pixels.is_cuda for pixels in got)
        assert torch.equal(torch.cat(got).cpu(), images.flip(0))
