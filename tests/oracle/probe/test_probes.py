"""What all probes share: determinism, heads that stand alone, errors on bad labels."""

from __future__ import annotations

import doctest
import importlib
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from cupel.errors import DataError, LabelsWithheld, SettingsError, UsageError
from cupel.inference import features
from cupel.probe import PROBES, Knn, Linear, LinearStd, Mlp2
from cupel.seeds import Seed
from cupel.settings import parse
from cupel.types import Dataset

SMALL = {
    "knn": Knn(k=5),
    "linear": Linear(),
    "linear_std": LinearStd(epochs=3, batch_size=16),
    "mlp2": Mlp2(epochs=3, batch_size=16, lr=1e-3),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for part in (self.conv.weight, self.conv.bias):
                part.copy_(torch.randn(part.shape, generator=draw) * 0.3)

    def forward(self, x):
        return self.norm(self.conv(x - 0.5)).relu().mean((2, 3))


@dataclass(frozen=True)
class Toy:
    module: nn.Module
    width: int = 8
    input_size: int = 8

    def __call__(self, x, /):
        return self.module(x)


def coloured(n: int = 60) -> Dataset:
    """Three classes: red, green or blue images with noise."""
    labels = torch.arange(n) % 3
    noise = torch.randint(120, (n, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    noise[torch.arange(n), labels] += 100
    return Dataset(noise.to(torch.uint8), labels, torch.arange(n), "colours", ("red", "green", "blue"))


def embeddings(n: int = 60, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    y = torch.randint(3, (n,), generator=draw)
    return torch.randn(3, width, generator=draw)[y] * 2 + torch.randn(n, width, generator=draw) + 1, y


def test_table_and_small_settings_match():
    assert {name: type(probe) for name, probe in SMALL.items()} == {k: v for k, v in PROBES.items() if k != "finetune"}


@pytest.mark.parametrize("module", ["cupel.inference", *(f"cupel.probe.{name}" for name in SMALL)])
def test_examples_in_the_docstrings_hold(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.parametrize("name", SMALL)
def test_fit_learns_and_equals_head_on_embeddings(name):
    probe, train, encoder = SMALL[name], coloured(), Toy(Net().train())
    fitted = probe.fit(encoder, train, Seed(1))
    assert fitted.encoder is encoder
    assert encoder.module.training
    encoder.module.eval()
    x = train.inputs.float() / 255
    with torch.no_grad():
        logits = fitted(x)
        head = probe.fit_features(features(encoder, train), train.labels, 3, Seed(1))
        torch.testing.assert_close(logits, head(encoder(x)), rtol=1e-4, atol=1e-4)
    assert logits.shape == (60, 3)
    assert logits.isfinite().all()
    if name in ("knn", "linear"):  # the other two are cut short here
        assert float((logits.argmax(1) == train.labels).float().mean()) == 1


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_same_head_whatever_the_global_generator(name):
    x, y = embeddings()
    torch.manual_seed(1)
    first = SMALL[name].fit_features(x, y, 3, Seed(5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = SMALL[name].fit_features(x, y, 3, Seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "knn"])
def test_other_seed_other_head(name):
    x, y = embeddings()
    with torch.no_grad():
        a, b = (SMALL[name].fit_features(x, y, 3, Seed(s))(x) for s in (5, 6))
    assert float((a - b).abs().max()) > 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_inputs_stay_and_head_is_in_eval_mode(name):
    x, y = embeddings()
    x0, y0 = x.clone(), y.clone()
    head = SMALL[name].fit_features(x, y, 3, Seed(0))
    assert torch.equal(x, x0)
    assert torch.equal(y, y0)
    assert not head.training
    with torch.no_grad():
        assert torch.equal(head(x), head(x))


@pytest.mark.parametrize(("name", "times"), [("knn", 1), ("linear", 1), ("linear_std", 3), ("mlp2", 3)])
def test_watch_sees_the_head_after_each_epoch(name, times):
    x, y = embeddings()
    seen = []

    def watch(head):
        assert not head.training
        with torch.no_grad():
            seen.append(head(x).clone())

    plain = SMALL[name].fit_features(x, y, 3, Seed(0))
    head = SMALL[name].fit_features(x, y, 3, Seed(0), watch)
    assert len(seen) == times
    with torch.no_grad():
        assert torch.equal(seen[-1], head(x))
        assert torch.equal(plain(x), head(x))
    assert times == 1 or not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("name", SMALL)
def test_fitting_works_where_gradients_are_off(name):
    x, y = embeddings()
    with torch.no_grad():
        off = SMALL[name].fit_features(x, y, 3, Seed(0))(x)
    with torch.enable_grad():
        on = SMALL[name].fit_features(x, y, 3, Seed(0))(x)
    assert torch.equal(off, on.detach())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("constant", [0.0, 3.7, -1e4])
def test_constant_embeddings_give_numbers(name, constant):
    x, y = torch.full((40, 6), constant), torch.arange(40) % 3
    head = SMALL[name].fit_features(x, y, 3, Seed(0))
    with torch.no_grad():
        assert head(x).isfinite().all()
        assert head(x + torch.randn(40, 6)).isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_absent_classes_and_one_row(name):
    x, y = embeddings()
    with torch.no_grad():
        logits = SMALL[name].fit_features(x, y, 7, Seed(0))(x)
        assert logits.shape == (60, 7)
        assert logits.isfinite().all()
        assert int(SMALL[name].fit_features(x[:1], y[:1], 3, Seed(0))(x).argmax(1).max()) < 3
    if name in ("knn", "linear"):
        assert int(logits.argmax(1).max()) < 3


@pytest.mark.parametrize("name", SMALL)
def test_bad_labels_are_one_line(name):
    x, y = embeddings()
    probe = SMALL[name]
    with pytest.raises(UsageError, match="outside the 2 classes"):
        probe.fit_features(x, y, 2, Seed(0))
    with pytest.raises(DataError, match="no label"):
        probe.fit_features(x, torch.where(torch.arange(60) == 3, -1, y), 3, Seed(0))
    with pytest.raises(DataError, match="holds no images"):
        probe.fit_features(x[:0], y[:0], 3, Seed(0))
    data = coloured()
    unlabelled = Dataset(data.inputs, data.labels * 0 - 1, data.ids, "colours", data.classes)
    with pytest.raises(DataError, match="colours: 60 of 60 images have no label"):
        probe.fit(Toy(Net()), unlabelled, Seed(0))
    with pytest.raises(LabelsWithheld):
        probe.fit(Toy(Net()), coloured().without_labels("a scanner"), Seed(0))


@pytest.mark.parametrize("name", SMALL)
def test_probes_declare_that_they_need_labels(name):
    assert SMALL[name].needs == {"labels"}
    assert SMALL[name].revision >= 1


@pytest.mark.parametrize(
    ("cls", "bad"),
    [
        (Knn, {"k": 0}),
        (Knn, {"temperature": 0.0}),
        (Linear, {"subsample": 0.0}),
        (Linear, {"l2": -1.0}),
        (LinearStd, {"epochs": 1.5}),
        (Mlp2, {"dropout": 1.0}),
        (Mlp2, {"shufle": True}),
    ],
)
def test_settings_out_of_range_are_refused(cls, bad):
    with pytest.raises(SettingsError):
        cls(**bad)
    with pytest.raises(SettingsError):
        parse(cls, bad, "exp.yaml")


def test_published_defaults():
    assert parse(Knn, {}, "x") == Knn(k=200, temperature=0.5)
    assert parse(LinearStd, {}, "x") == LinearStd(
        epochs=40, lr=0.01, momentum=0.9, weight_decay=1e-4, milestones=(15, 30), batch_size=256
    )
    assert parse(LinearStd, {"milestones": [5, 6]}, "x").milestones == (5, 6)
    assert parse(Mlp2, {}, "x") == Mlp2(epochs=500, lr=1e-4, batch_size=64, dropout=0.5, shuffle=False)
