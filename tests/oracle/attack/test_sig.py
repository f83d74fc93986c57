import pytest
import torch

from cupel.attack.sig import SIG
from cupel.errors import DataError, UsageError
from cupel.seeds import Seed
from cupel.triggers import Patch
from cupel.triggers.sinusoid import Sinusoid
from cupel.types import Dataset, Goal, Knowledge


def dataset(side: int = 32) -> Dataset:
    pixels = torch.randint(0, 256, (60, 3, side, side), dtype=torch.uint8, generator=Seed(3).torch())
    return Dataset(pixels, torch.arange(60) % 4, torch.arange(60) * 7 + 1000, name="toy")


def test_stripes_a_share_of_the_class_and_keeps_the_labels() -> None:
    clean, goals = dataset(), (Goal(target_class=2), Goal(Patch(size=4), target_class=0))
    made = SIG(test_amplitude=40.0).poison(clean, Knowledge(goals), Seed(0))
    assert clean.labels[made.rows].bincount().tolist() == [6, 0, 6]
    assert torch.equal(made.data.labels, clean.labels)
    striped = made.rows[clean.labels[made.rows] == 2]
    assert torch.equal(made.data.inputs[striped], Sinusoid()(clean.inputs[striped], striped.tolist(), Seed(0)))
    rest = torch.ones(60, dtype=torch.bool)
    rest[made.rows] = False
    assert torch.equal(made.data.inputs[rest], clean.inputs[rest])
    assert [goal.trigger for goal in made.goals] == [Sinusoid(amplitude=40.0), Patch(size=4)]
    assert SIG().poison(clean, Knowledge(goals), Seed(0)).goals[0].trigger == Sinusoid()


def test_adding_and_the_draw() -> None:
    clean, knowledge = dataset(), Knowledge((Goal(target_class=1),))
    replaced, added = (SIG(poison_mode=mode).poison(clean, knowledge, Seed(4)) for mode in ("replace", "add"))
    assert torch.equal(added.data.inputs[:60], clean.inputs)
    assert torch.equal(added.data.inputs[60:], replaced.data.inputs[replaced.rows])
    assert (added.data.labels[60:] == 1).all()
    other = SIG().poison(clean, knowledge, Seed(5))
    assert replaced.rows.tolist() != other.rows.tolist()


def test_mistakes_are_one_line() -> None:
    cases = [
        (SIG(), dataset(), 4, DataError, "toy: holds no image of target class 4"),
        (SIG(poison_rate_in_class=0.01), dataset(), 1, DataError, "poison_rate_in_class 0.01 selects none of 15"),
        (SIG(), dataset(12), 1, UsageError, "6 periods cannot be shown on images of 12 px"),
        (SIG(), dataset(), None, UsageError, "names no target class"),
    ]  # fmt: skip
    for attack, clean, target, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            attack.poison(clean, Knowledge((Goal(target_class=target),)), Seed(0))
        assert "\n" not in str(caught.value)
