"""Embeddings that are kept: found by content alone, whole or not at all, bounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cupel.encoders import ImageEncoder
from cupel.errors import DataError
from cupel.feature_store import FeatureStore, active_store, storing_features
from cupel.inference import features, triggered
from cupel.probe import Knn, Linear, Mlp2
from cupel.progress import reporting
from cupel.seeds import Seed
from cupel.triggers import Patch
from toys import blobs, small_encoder

DATA = blobs(300)


class Counting(ImageEncoder):
    """Counts the images that go through it; never folded, since that would go round the counter."""

    def __init__(self, encoder):
        super().__init__(encoder.module, encoder.card)
        object.__setattr__(self, "seen", [])

    def __call__(self, x, /):
        self.seen.append(len(x))
        return super().__call__(x)


def embed(encoder, data=DATA, **more):
    return features(encoder, data, dtype=torch.float32, **more)


def test_the_same_content_is_embedded_once(tmp_path):
    plain = embed(small_encoder())
    with storing_features(tmp_path):
        first, second = Counting(small_encoder()), Counting(small_encoder())
        assert torch.equal(embed(first), plain)
        assert torch.equal(embed(second), plain)  # another object with equal weights
    assert (sum(first.seen), second.seen) == (300, [])
    third = Counting(small_encoder())
    embed(third)  # outside of the `with`
    assert sum(third.seen) == 300
    assert active_store() is None


@pytest.mark.parametrize("change", ["weight", "statistic", "pixel", "order", "precision"])
def test_other_content_is_embedded_anew(tmp_path, change):
    with storing_features(tmp_path):
        embed(small_encoder())
        encoder, data, more = small_encoder(), DATA, {"dtype": torch.float32}
        with torch.no_grad():
            if change == "weight":
                encoder.module.backbone.layer3.conv2.weight[0, 0, 0, 0] += 0.5
            if change == "statistic":
                encoder.module.backbone.bn1.running_mean[0] += 0.5
        if change == "pixel":
            raw = DATA.inputs.clone()
            raw[17, 0, 0, 0] ^= 1
            data = DATA.with_inputs(raw, "other")
        if change == "order":
            data = DATA.subset(torch.arange(299, -1, -1))
        if change == "precision":
            more = {"dtype": torch.bfloat16}
        made = features(encoder, data, **more)
        assert len(list(tmp_path.glob("*.npy"))) == 2
    assert torch.equal(made, features(encoder, data, **more))


def test_labels_do_not_matter(tmp_path):
    with storing_features(tmp_path):
        embed(small_encoder())
        other = Counting(small_encoder())
        embed(other, DATA.without_labels("a scanner"))
    assert other.seen == []


def test_a_large_array_is_a_memory_map_that_may_be_written_to_without_harm(tmp_path):
    store = FeatureStore(tmp_path)
    with store.new("k", 4, 2) as rows:
        rows.copy_(torch.arange(8.0).view(4, 2))
    found = store.find("k")
    found[0, 0] = 99.0
    assert float(store.find("k")[0, 0]) == 0.0
    assert isinstance(np.load(tmp_path / "k.npy", mmap_mode="c"), np.memmap)


@pytest.mark.parametrize("damage", ["flip", "truncate", "checksum"])
def test_damage_is_found_and_made_good(tmp_path, damage):
    class Heard:
        def __init__(self) -> None:
            self.said: list[str] = []

        def say(self, text):
            self.said.append(text)

    with storing_features(tmp_path), reporting(heard := Heard()):
        whole = embed(small_encoder()).clone()  # else it shows what is written to the file below
        (path,) = tmp_path.glob("*.npy")
        raw = bytearray(path.read_bytes())
        if damage == "flip":
            raw[-5] ^= 4
            path.write_bytes(raw)
        elif damage == "truncate":
            path.write_bytes(raw[:-100])
        else:
            path.with_suffix(".sha256").unlink()
        again = Counting(small_encoder())
        assert torch.equal(embed(again), whole)
        assert sum(again.seen) == 300
        assert len(heard.said) == 1
        assert "damaged" in heard.said[0]
        embed(third := Counting(small_encoder()))
        assert third.seen == []


def test_a_failure_leaves_nothing(tmp_path):
    encoder = small_encoder()
    with torch.no_grad():
        encoder.module.backbone.layer3.conv2.weight.fill_(float("nan"))
    with storing_features(tmp_path), pytest.raises(DataError, match="not finite"):
        embed(encoder)
    assert list(tmp_path.iterdir()) == []


def test_the_longest_unused_go_first(tmp_path):
    store = FeatureStore(tmp_path, limit=3 * 1000)
    for name in "abc":
        with store.new(name, 24, 9) as rows:  # 864 bytes and the header
            rows.zero_()
    assert store.find("a") is not None  # used again: now `b` is the oldest
    with store.new("d", 24, 9) as rows:
        rows.zero_()
    assert sorted(p.stem for p in tmp_path.glob("*.npy")) == ["a", "c", "d"][-len(list(tmp_path.glob("*.npy"))) :]
    assert not (tmp_path / "b.npy").exists()
    assert not (tmp_path / "b.sha256").exists()


def test_probes_share_one_pass(tmp_path):
    encoder = Counting(small_encoder())
    with storing_features(tmp_path):
        for probe in (Knn(k=5), Linear(), Mlp2(epochs=1)):
            embedded = sum(encoder.seen)
            probe.fit(encoder, DATA, Seed(0))
            assert embedded in (0, sum(encoder.seen))


def test_small_sets_and_stamps_put_on_while_reading_are_not_kept(tmp_path):
    with storing_features(tmp_path):
        features(small_encoder(), blobs(60))
        features(small_encoder(), DATA.inputs)
        assert list(tmp_path.iterdir()) == []
        features(small_encoder(), triggered(DATA, Patch(size=3), Seed(0)))  # in memory: pixels like any other
        assert len(list(tmp_path.glob("*.npy"))) == 1
