import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cupel.attack.ssl_backdoor import SSLBackdoor
from cupel.errors import DataError, LabelsWithheld, SettingsError, UsageError
from cupel.poisoning import chosen_rows
from cupel.seeds import Seed
from cupel.settings import parse
from cupel.triggers import Patch, RandomPatch
from cupel.triggers.random_patch import corners
from cupel.types import Dataset, Goal, Knowledge


def dataset(n: int = 60, classes: int = 4) -> Dataset:
    pixels = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=Seed(3).torch())
    return Dataset(pixels, torch.arange(n) % classes, torch.arange(n) * 7 + 1000, name="toy")


def attacker(*classes: int | None, **more: Any) -> Knowledge:
    return Knowledge(goals=tuple(Goal(target_class=c, task="toy", **more) for c in classes))


@pytest.mark.parametrize(("rate", "number"), [(0.5, 8), (0.4, 6), (0.1, 2), (1.0, 15)])
def test_replaces_the_rounded_share_of_the_class_and_nothing_else(rate: float, number: int) -> None:
    clean = dataset()
    before = clean.inputs.clone()
    made = SSLBackdoor(poison_rate_in_class=rate).poison(clean, attacker(2), Seed(0))
    assert torch.equal(clean.inputs, before)
    assert len(made.rows) == number == round(rate * 15)
    assert made.rows.tolist() == sorted(set(made.rows.tolist()))
    assert (clean.labels[made.rows] == 2).all()
    assert torch.equal(made.data.labels, clean.labels)
    assert torch.equal(made.data.ids, clean.ids)
    changed = (made.data.inputs != clean.inputs).flatten(1).any(dim=1)
    assert torch.equal(changed.nonzero().flatten(), made.rows)


def test_the_stamp_sits_in_the_training_band_and_the_goal_gets_the_wider_one() -> None:
    clean, attack = dataset(400), SSLBackdoor(trigger=RandomPatch(size=6, pattern_seed=9))
    made = attack.poison(clean, attacker(1), Seed(0))
    places = corners(32, 32, 6, 0.25, 0.75, clean.ids[made.rows].tolist(), Seed(0).child("place", 0))
    for row, (top, left) in zip(made.rows.tolist(), places, strict=True):
        assert 8 <= top <= 18
        assert 8 <= left <= 18
        expected = clean.inputs[row].clone()
        expected[:, top : top + 6, left : left + 6] = attack.trigger.picture()
        assert torch.equal(made.data.inputs[row], expected)
    assert made.goals == (Goal(RandomPatch(size=6, pattern_seed=9, low=0.1, high=0.9), task="toy", target_class=1),)


def test_adding_keeps_the_clean_images_and_brings_new_ids() -> None:
    clean = dataset()
    replaced = SSLBackdoor().poison(clean, attacker(3), Seed(4))
    added = SSLBackdoor(poison_mode="add").poison(clean, attacker(3), Seed(4))
    assert len(added.data) == 68
    assert added.rows.tolist() == list(range(60, 68))
    assert torch.equal(added.data.inputs[:60], clean.inputs)
    assert torch.equal(added.data.inputs[60:], replaced.data.inputs[replaced.rows])
    assert (added.data.labels[60:] == 3).all()
    assert added.data.ids[60:].min() > clean.ids.max()


def test_several_goals_poison_their_classes_with_their_own_triggers() -> None:
    clean, own = dataset(), Patch(size=5, color="red")
    goals = (Goal(target_class=0), Goal(trigger=own, target_class=2))
    made = SSLBackdoor().poison(clean, Knowledge(goals), Seed(0))
    assert clean.labels[made.rows].bincount().tolist() == [8, 0, 8]
    assert made.rows.tolist() == sorted(made.rows.tolist())
    second = made.rows[clean.labels[made.rows] == 2]
    expected = own(clean.inputs[second], clean.ids[second].tolist(), Seed(0))
    assert torch.equal(made.data.inputs[second], expected)
    assert made.goals[1].trigger == own
    with pytest.raises(UsageError, match="same target class"):
        SSLBackdoor().poison(clean, attacker(2, 2), Seed(0))


def test_the_choice_depends_on_seed_and_ids_alone() -> None:
    clean = dataset()
    order = torch.randperm(60, generator=Seed(8).torch())
    a = SSLBackdoor().poison(clean, attacker(2), Seed(0))
    b = SSLBackdoor().poison(clean.subset(order), attacker(2), Seed(0))
    c = SSLBackdoor().poison(clean, attacker(2), Seed(1))
    assert set(clean.ids[a.rows].tolist()) == set(clean.ids[order][b.rows].tolist())
    assert torch.equal(a.data.inputs[order], b.data.inputs)
    assert set(a.rows.tolist()) != set(c.rows.tolist())


def test_every_image_is_chosen_equally_often() -> None:
    times = torch.zeros(20)
    for t in range(400):
        times[chosen_rows(list(range(20)), 0.25, Seed(0).child(t))] += 1
    assert times.sum() == 400 * 5
    assert (times - 100).abs().max() < 4 * (400 * 0.25 * 0.75) ** 0.5


@pytest.mark.full
def test_another_process_poisons_the_same_bytes() -> None:
    code = (
        "import hashlib, torch\n"
        "from cupel.attack.ssl_backdoor import SSLBackdoor\n"
        "from cupel.seeds import Seed\n"
        "from cupel.types import Dataset, Goal, Knowledge\n"
        "data = Dataset(torch.zeros(40, 3, 32, 32, dtype=torch.uint8), torch.arange(40) % 4, torch.arange(40))\n"
        "made = SSLBackdoor().poison(data, Knowledge((Goal(target_class=1),)), Seed(5))\n"
        "print(hashlib.sha256(made.data.inputs.numpy().tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    data = Dataset(torch.zeros(40, 3, 32, 32, dtype=torch.uint8), torch.arange(40) % 4, torch.arange(40))
    made = SSLBackdoor().poison(data, attacker(1), Seed(5))
    assert other == hashlib.sha256(made.data.inputs.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class _Lazy:
    pixels: Tensor

    @property
    def shape(self) -> Sequence[int]:
        return self.pixels.shape

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Any, /) -> Tensor:
        return self.pixels[rows]

    def content(self) -> list[bytes]:
        return [bytes(row.flatten().tolist()) for row in self.pixels]


def test_images_that_decode_lazily_give_the_same() -> None:
    clean = dataset()
    lazy = dataclasses.replace(clean, inputs=_Lazy(clean.inputs))
    a, b = (SSLBackdoor().poison(data, attacker(0), Seed(0)) for data in (clean, lazy))
    assert torch.equal(a.data.inputs, b.data.inputs)


def test_mistakes_are_one_line() -> None:
    clean = dataset()
    cases = [
        (SSLBackdoor(), attacker(4), DataError, r"toy: holds no image of target class 4; choose one of \[0, 1, 2, 3\]"),
        (SSLBackdoor(), attacker(None), UsageError, "names no target class"),
        (SSLBackdoor(poison_rate_in_class=0.0), attacker(0), DataError, "selects none of 15 images"),
        (SSLBackdoor(poison_rate_in_class=0.03), attacker(0), DataError, "selects none of 15 images"),
        (SSLBackdoor(poison_rate_in_class=1.0), attacker(0, 1, 2, 3), DataError, "selects all 60 images"),
        (SSLBackdoor(trigger=RandomPatch(size=17)), attacker(0), UsageError, "17 px does not fit"),
    ]
    for attack, knowledge, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            attack.poison(clean, knowledge, Seed(0))
        assert "\n" not in str(caught.value)
    with pytest.raises(LabelsWithheld):
        SSLBackdoor().poison(clean.without_labels("somebody"), attacker(0), Seed(0))
    assert SSLBackdoor.needs == {"labels"}


def test_settings_from_yaml() -> None:
    attack = parse(SSLBackdoor, {"trigger": {"method": "random_patch", "size": 4}, "poison_mode": "add"}, "exp.yaml")
    assert attack == SSLBackdoor(trigger=RandomPatch(size=4), poison_mode="add")
    with pytest.raises(SettingsError, match=r"exp\.yaml\.trigger\[random_patch\]: unknown key 'sise'"):
        parse(SSLBackdoor, {"trigger": {"method": "random_patch", "sise": 4}}, "exp.yaml")
