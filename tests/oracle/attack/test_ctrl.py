import re

import pytest
import torch

from cupel.attack.ctrl import CTRL
from cupel.errors import DataError, LabelsWithheld, SettingsError, UsageError
from cupel.seeds import Seed
from cupel.triggers.spectral import Spectral
from cupel.types import Dataset, Goal, Knowledge


def dataset(n: int = 200, classes: int = 4, side: int = 32) -> Dataset:
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=Seed(3).torch())
    labels = torch.randint(0, classes, (n,), generator=Seed(4).torch())
    return Dataset(pixels, labels, torch.arange(n) * 7 + 1000, name="toy")


def attacker(*classes: int | None) -> Knowledge:
    return Knowledge(goals=tuple(Goal(target_class=c, task="toy") for c in classes))


def test_published_count_of_cifar10_and_its_order() -> None:
    labels = torch.arange(50_000) % 10
    clean = Dataset(torch.zeros(50_000, 3, 2, 2, dtype=torch.uint8), labels, torch.arange(50_000), name="cifar10")
    made = CTRL().poison(clean, attacker(0), Seed(7777))
    assert made.rows.tolist() == list(range(0, 5000, 10)), "the first 500 of class 0"
    assert torch.equal(made.rows, CTRL().poison(clean, attacker(0), Seed(1)).rows)


def test_poisons_the_first_of_the_class_and_nothing_else() -> None:
    clean = dataset()
    made = CTRL(poison_rate=0.07).poison(clean, attacker(2), Seed(0))
    first = [row for row in range(200) if clean.labels[row] == 2][:14]
    assert made.rows.tolist() == first, "0.07 · 200 is a little less than 14 in floating point"
    assert torch.equal(made.data.labels, clean.labels)
    assert torch.equal(made.data.ids, clean.ids)
    changed = (made.data.inputs != clean.inputs).flatten(1).any(dim=1)
    assert changed.nonzero().flatten().tolist() == first
    assert torch.equal(made.data.inputs[made.rows], Spectral()(clean.inputs[made.rows], first, Seed(0)))
    assert made.goals == (Goal(Spectral(), task="toy", target_class=2),)


def test_adding_and_several_goals() -> None:
    clean = dataset()
    made = CTRL(poison_rate=0.05, poison_mode="add").poison(clean, attacker(3, 1), Seed(0))
    assert torch.equal(made.data.inputs[:200], clean.inputs)
    assert made.data.labels[200:].bincount().tolist() == [0, 10, 0, 10]
    assert made.rows.tolist() == list(range(200, 220))
    both = CTRL(poison_rate=0.05).poison(clean, attacker(3, 1), Seed(0))
    assert clean.labels[both.rows].bincount().tolist() == [0, 10, 0, 10]


def test_mistakes_are_one_line() -> None:
    clean, counts = dataset(), dataset().labels.bincount().tolist()
    wide = Goal(Spectral(window=64, shrink=False), target_class=0)
    cases = [
        (CTRL(), attacker(4), DataError, "toy: holds no image of target class 4"),
        (CTRL(), attacker(None), UsageError, "names no target class"),
        (CTRL(), attacker(1, 1), UsageError, "same target class"),
        (CTRL(), attacker(), DataError, "no goal"),
        (CTRL(poison_rate=0.0), attacker(0), DataError, "poison_rate 0 selects none of 200 images"),
        (CTRL(poison_rate=0.004), attacker(0), DataError, "poison_rate 0.004 selects none of 200 images"),
        (CTRL(poison_rate=0.5), attacker(0), DataError, f"selects 100 images, but there are {counts[0]} images"),
        (CTRL(), Knowledge((wide,)), UsageError, "window of 64 px does not fit"),
    ]  # fmt: skip
    for attack, knowledge, kind, message in cases:
        with pytest.raises(kind, match=re.escape(message)) as caught:
            attack.poison(clean, knowledge, Seed(0))
        assert "\n" not in str(caught.value)
    one = dataset(classes=1)
    with pytest.raises(DataError, match="selects all 200 images"):
        CTRL(poison_rate=1.0).poison(one, attacker(0), Seed(0))
    with pytest.raises(LabelsWithheld):
        CTRL().poison(clean.without_labels("somebody"), attacker(0), Seed(0))
    with pytest.raises(SettingsError, match="poison_rate"):
        CTRL(poison_rate=1.5)
