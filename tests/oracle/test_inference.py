"""Embeddings against direct forward passes, triggered data against stamping image by image."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from cupel.errors import DataError
from cupel.inference import FrozenProbe, classify, evaluating, features, triggered
from cupel.progress import reporting
from cupel.seeds import Seed
from cupel.types import Dataset


class Net(nn.Module):
    """Normalisation inside; BatchNorm and dropout, so that the mode matters."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for part in (self.conv.weight, self.conv.bias, self.norm.running_mean):
                part.copy_(torch.randn(part.shape, generator=draw) * 0.3)

    def forward(self, x):
        return self.drop(self.norm(self.conv(x * 2 - 1))).relu().mean((2, 3))


@dataclass(frozen=True)
class Toy:
    module: nn.Module
    width: int = 6
    input_size: int = 8

    def __call__(self, x, /):
        return self.module(x)


def images(n: int = 21, size: int = 8) -> torch.Tensor:
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def data(n: int = 21, size: int = 8) -> Dataset:
    return Dataset(images(n, size), torch.arange(n) % 3, torch.arange(n) + 100, "toy")


class Encoded:
    """Images that are decoded when indexed."""

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw, self.reads = raw, []

    @property
    def shape(self):
        return self.raw.shape

    def __len__(self):
        return len(self.raw)

    def __getitem__(self, rows):
        self.reads.append(len(rows))
        return self.raw[rows]

    def content(self):
        return [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest() for row in self.raw]


def direct(module: nn.Module, raw: torch.Tensor) -> torch.Tensor:
    module = module.eval()
    with torch.no_grad():
        return torch.cat([module(raw[i : i + 1].float() / 255) for i in range(len(raw))])


def test_features_equal_the_direct_forward_pass():
    net = Net()
    out = features(Toy(net), data(), batch_size=4)
    assert out.dtype == torch.float32
    assert not out.requires_grad
    torch.testing.assert_close(out, direct(Net(), images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5, 21, 512])
def test_chunks_do_not_matter(batch_size):
    torch.testing.assert_close(
        features(Toy(Net()), data(), batch_size=batch_size), features(Toy(Net()), data()), rtol=1e-5, atol=1e-6
    )


def test_tensors_in_both_forms_and_lazily_decoded_images_agree():
    encoder, whole = Toy(Net()), features(Toy(Net()), data())
    assert torch.equal(features(encoder, images()), whole)
    torch.testing.assert_close(features(encoder, images().float() / 255), whole)
    lazy = Encoded(images())
    part = Dataset(lazy, torch.zeros(21, dtype=torch.int64), torch.arange(21))
    torch.testing.assert_close(features(encoder, part, batch_size=8), whole, rtol=1e-5, atol=1e-6)
    assert lazy.reads == [8, 8, 5]
    assert features(encoder, images(0)).shape == (0, 6)


def test_labels_are_not_needed():
    torch.testing.assert_close(features(Toy(Net()), data().without_labels("test")), features(Toy(Net()), data()))


def test_module_is_left_as_it_was():
    net = Net().train()
    net.norm.eval()  # a frozen BatchNorm in a module that trains
    before = {k: v.clone() for k, v in net.state_dict().items()}
    features(Toy(net), data())
    assert [net.training, net.conv.training, net.norm.training, net.drop.training] == [True, True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    net.eval()
    features(Toy(net), data())
    assert not net.training


def test_mode_comes_back_after_an_error():
    net = Net().train()
    with contextlib.suppress(RuntimeError), evaluating(net):
        assert not net.norm.training
        raise RuntimeError
    assert net.norm.training


def test_wrong_size_names_both_sizes():
    with pytest.raises(DataError, match=r"toy: images are 9×9, the encoder takes 8×8; load the data at size 8"):
        features(Toy(Net()), data(size=9))


def test_embeddings_that_are_not_finite_are_refused():
    net = Net()
    with torch.no_grad():
        net.norm.bias[2] = torch.nan
    with pytest.raises(DataError, match="21 of 21 embeddings are not finite"):
        features(Toy(net), data())


class Lines:
    def __init__(self):
        self.said, self.steps = [], []

    def say(self, text):
        self.said.append(text)

    @contextlib.contextmanager
    def track(self, label, total):
        yield lambda done, **numbers: self.steps.append((label, done, total))


def test_half_precision_is_used_where_it_agrees():
    heard = Lines()
    with reporting(heard):
        half = features(Toy(Net()), data(), dtype=torch.bfloat16, batch_size=8)
    full = features(Toy(Net()), data())
    assert heard.said == []
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert float(torch.cosine_similarity(half, full).min()) > 0.9999


class Fragile(nn.Module):
    """Far from the origin: half precision leaves nothing of the difference."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 4, bias=False)
        with torch.no_grad():
            self.lin.weight.copy_(torch.tensor([[1.0, -1, 0], [0, 1, -1], [1, 0, -1], [1, -2, 1]]))

    def forward(self, x):
        return self.lin(x.mean((2, 3)) + 300)


def test_half_precision_falls_back_and_says_so():
    heard, encoder = Lines(), Toy(Fragile(), width=4)
    with reporting(heard):
        half = features(encoder, data(), dtype=torch.bfloat16, batch_size=8)
    assert torch.equal(half, features(encoder, data(), batch_size=8))
    assert len(heard.said) == 1
    assert "float32" in heard.said[0]


def test_other_precisions_are_a_mistake():
    with pytest.raises(ValueError, match="float16"):
        features(Toy(Net()), data(), dtype=torch.float16)


def test_progress_is_shown_on_demand():
    heard = Lines()
    with reporting(heard):
        features(Toy(Net()), data(), batch_size=10)
        assert heard.steps == []
        features(Toy(Net()), data(), batch_size=10, label="test set")
    assert heard.steps == [("test set", 10, 21), ("test set", 20, 21), ("test set", 21, 21)]


def noisy_stamp(raw, ids, seed):
    """A trigger that draws from (seed, id) alone."""
    out = raw.clone()
    for row, one in enumerate(ids):
        out[row, :, :2, :2] = torch.randint(
            256, (3, 2, 2), dtype=torch.uint8, generator=seed.child("stamp", one).torch()
        )
    return out


@pytest.mark.parametrize("block", [1, 4, 512])
def test_triggered_equals_stamping_one_by_one(block):
    clean = data()
    before = clean.inputs.clone()
    made = triggered(clean, noisy_stamp, Seed(3), block=block)
    one_by_one = [noisy_stamp(clean.inputs[i : i + 1], [int(clean.ids[i])], Seed(3)) for i in range(21)]
    assert torch.equal(made.inputs, torch.cat(one_by_one))
    assert torch.equal(clean.inputs, before)
    assert torch.equal(made.labels, clean.labels)
    assert torch.equal(made.ids, clean.ids)
    assert made.name == "toy, triggered"
    assert not torch.equal(made.inputs, triggered(clean, noisy_stamp, Seed(4)).inputs)


def test_lazy_images_are_stamped_when_read():
    lazy = Encoded(images())
    source = Dataset(lazy, torch.arange(21) % 3, torch.arange(21) + 100, "toy")
    made = triggered(source, noisy_stamp, Seed(3), block=4)
    assert lazy.reads == []
    whole = triggered(data(), noisy_stamp, Seed(3))
    rows = torch.tensor([20, 3, 3, 7, 0, 11])
    assert torch.equal(made.inputs[rows], whole.inputs[rows])
    assert torch.equal(made.subset(rows.unique()).inputs[torch.arange(2)], whole.inputs[[0, 3]])
    assert torch.equal(made.inputs[2:5], whole.inputs[2:5])
    assert torch.equal(made.inputs[4], whole.inputs[4])
    assert made.content() == whole.content()
    assert made.sha256 == whole.sha256
    assert torch.equal(features(Toy(Net()), made, batch_size=6), features(Toy(Net()), whole, batch_size=6))


def test_a_trigger_that_changes_the_shape_is_refused():
    with pytest.raises(DataError, match="keep shape and type"):
        triggered(data(), lambda raw, ids, seed: raw.float(), Seed(0))


def test_triggered_of_nothing_is_nothing():
    assert len(triggered(data(0), noisy_stamp, Seed(0))) == 0


def test_classifier_is_head_of_encoder_and_differentiable():
    encoder, head = Toy(Net().eval()), nn.Linear(6, 3)
    probe = FrozenProbe(encoder, head)
    x = (images().float() / 255).requires_grad_()
    logits = probe(x)
    assert torch.equal(logits, head(encoder(x)))
    logits.sum().backward()
    assert x.grad.abs().sum() > 0


def test_classify_in_chunks_and_in_eval_mode():
    head = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.9)).train()
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = head[0](x).argmax(1)
    for size in (1, 7, 4096):
        assert torch.equal(classify(head, x, batch_size=size), want)
    assert head.training
    assert classify(head, x[:0]).tolist() == []
