import re
from typing import Any

import pytest
import torch
from torch import nn

from cupel import metrics
from cupel.attack.badnets import BadNets
from cupel.attack.blended import Blended
from cupel.errors import DataError, LabelsWithheld, SettingsError, UsageError
from cupel.inference import triggered
from cupel.seeds import Seed
from cupel.settings import parse
from cupel.triggers import Patch
from cupel.triggers.overlay import Overlay
from cupel.types import Dataset, Goal, Knowledge
from toys import blobs, small_encoder


def dataset(n: int = 200, classes: int = 4, side: int = 32) -> Dataset:
    pixels = torch.randint(2, 255, (n, 3, side, side), dtype=torch.uint8, generator=Seed(3).torch())
    labels = torch.randint(0, classes, (n,), generator=Seed(4).torch())
    return Dataset(pixels, labels, torch.arange(n) * 7 + 1000, name="toy")


def attacker(*classes: int | None) -> Knowledge:
    return Knowledge(goals=tuple(Goal(target_class=c, task="toy") for c in classes))


def test_badnets_changes_nine_pixels_to_white_and_the_label() -> None:
    clean = dataset()
    before, labels = clean.inputs.clone(), clean.labels.clone()
    made = BadNets().poison(clean, attacker(2), Seed(0))
    assert torch.equal(clean.inputs, before)
    assert torch.equal(clean.labels, labels)
    assert len(made.rows) == 20
    changed = (made.data.inputs != clean.inputs).any(dim=1)
    assert changed.flatten(1).any(dim=1).nonzero().flatten().tolist() == made.rows.tolist()
    assert changed[made.rows].flatten(1).sum(dim=1).tolist() == [9] * 20
    assert (made.data.inputs[made.rows][:, :, 29:, 29:] == 255).all()
    assert (made.data.labels[made.rows] == 2).all()
    rest = torch.ones(200, dtype=torch.bool)
    rest[made.rows] = False
    assert torch.equal(made.data.labels[rest], clean.labels[rest])
    assert made.goals == (Goal(Patch(size=3, margin=0), task="toy", target_class=2),)


def test_badnets_grid_variant() -> None:
    clean, goal = dataset(), Goal(Overlay(picture="grid", alpha=1.0), target_class=2)
    made = BadNets().poison(clean, Knowledge((goal,)), Seed(0))
    changed = (made.data.inputs != clean.inputs)[made.rows]
    assert changed.flatten(2).sum(dim=2).unique().tolist() == [9]
    assert made.data.inputs[made.rows][changed].unique().tolist() == [1, 255]


def test_blended_mixes_the_picture_and_rounds_down() -> None:
    clean = dataset()
    made = Blended(poison_rate=0.5).poison(clean, attacker(1), Seed(0))
    assert len(made.rows) == 100
    k = Overlay().mask_and_pattern(32)[1].long()
    assert torch.equal(made.data.inputs[made.rows].long(), (8 * clean.inputs[made.rows].long() + 2 * k) // 10)
    assert made.goals[0].trigger == Overlay(), "the same at test time"


def test_target_class_is_drawn_like_every_other() -> None:
    classes, rate, total, times = 4, 0.1, 0, 60
    clean = dataset(200, classes, side=3)
    for t in range(times):
        made = BadNets(poison_rate=rate).poison(clean, attacker(1), Seed(t))
        assert len(made.rows) == 20
        total += int((clean.labels[made.rows] == 1).sum())
    share = float((clean.labels == 1).float().mean())
    drawn = times * 20
    assert abs(total - share * drawn) < 3 * (drawn * share * (1 - share)) ** 0.5


def test_test_time_leaves_the_target_class_out() -> None:
    clean = dataset()
    predicted = torch.randint(0, 4, (200,), generator=Seed(9).torch())
    hits, n = metrics.attack_success_rate(predicted, clean.labels, 1)
    right, m = metrics.poisoned_accuracy(predicted[clean.labels != 1], clean.labels[clean.labels != 1])
    assert n == m == int((clean.labels != 1).sum())
    assert hits / n + right / m <= 1


def test_clean_label_takes_the_target_class_alone() -> None:
    clean = dataset()
    made = Blended(poison_rate=0.1, clean_label=True).poison(clean, attacker(3), Seed(0))
    assert len(made.rows) == 20, "of all images"
    assert (clean.labels[made.rows] == 3).all()
    assert torch.equal(made.data.labels, clean.labels)


def test_adding_and_several_goals() -> None:
    clean = dataset()
    replaced, added = (BadNets(poison_mode=mode).poison(clean, attacker(1), Seed(4)) for mode in ("replace", "add"))
    assert torch.equal(added.data.inputs[:200], clean.inputs)
    assert torch.equal(added.data.labels[:200], clean.labels)
    assert (len(replaced.rows), len(added.rows)) == (20, 22), "a tenth of all images as trained on"
    stamps = {image.numpy().tobytes() for image in added.data.inputs[200:]}
    assert {image.numpy().tobytes() for image in replaced.data.inputs[replaced.rows]} <= stamps
    assert (added.data.labels[200:] == 1).all()
    goals = (Goal(target_class=0), Goal(Patch(size=5, color="red"), target_class=2))
    both = BadNets(poison_rate=0.4).poison(clean, Knowledge(goals), Seed(0))
    assert len(both.rows) == 160 == len(set(both.rows.tolist())), "no image bears two triggers"
    red = (both.data.inputs[both.rows][:, :, -3, -3] == torch.tensor([255, 0, 0])).all(dim=1)
    assert both.data.labels[both.rows].tolist() == [2 if one else 0 for one in red.tolist()]


def test_the_choice_depends_on_seed_and_ids_alone() -> None:
    clean = dataset()
    order = torch.randperm(200, generator=Seed(8).torch())
    a = BadNets().poison(clean, attacker(2), Seed(0))
    b = BadNets().poison(clean.subset(order), attacker(2), Seed(0))
    assert torch.equal(a.data.inputs[order], b.data.inputs)
    assert torch.equal(a.data.labels[order], b.data.labels)
    assert a.rows.tolist() != BadNets().poison(clean, attacker(2), Seed(1)).rows.tolist()


@pytest.mark.parametrize("cls", [BadNets, Blended])
def test_mistakes_are_one_line(cls: Any) -> None:
    clean, counts = dataset(), dataset().labels.bincount().tolist()
    cases = [
        (cls(), attacker(4), DataError, "toy: holds no image of target class 4; choose one of [0, 1, 2, 3]"),
        (cls(), attacker(None), UsageError, "names no target class"),
        (cls(), attacker(), DataError, "no goal"),
        (cls(poison_rate=0.0), attacker(0), DataError, "poison_rate 0 selects none of 200 images"),
        (cls(poison_rate=0.001), attacker(0), DataError, "poison_rate 0.001 selects none of 200 images"),
        (cls(poison_rate=1.0), attacker(0), DataError, "selects all 200 images"),
        (cls(poison_rate=0.5), attacker(0, 1), DataError, "selects all 200 images"),
        (cls(poison_rate=0.6), attacker(0, 1), DataError, "selects 120 images, but there are 80 images that bear no"),
        (cls(poison_rate=0.5, clean_label=True), attacker(1), DataError, f"there are {counts[1]} images of class 1"),
        (cls(trigger=Patch(size=33)), attacker(0), UsageError, "33 px"),
    ]  # fmt: skip
    for attack, knowledge, kind, message in cases:
        with pytest.raises(kind, match=re.escape(message)) as caught:
            attack.poison(clean, knowledge, Seed(0))
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="does not fit into images of 2 × 2 px"):
        BadNets().poison(dataset(side=2), attacker(0), Seed(0))
    with pytest.raises(LabelsWithheld):
        cls().poison(clean.without_labels("somebody"), attacker(0), Seed(0))
    with pytest.raises(SettingsError, match="poison_rate"):
        parse(cls, {"poison_rate": 1.1}, "exp.yaml")


def rates(train: Dataset, test: Dataset, trigger: Any) -> tuple[float, float]:
    """Clean accuracy, and share of triggered images of other classes that are taken for class 1, of a network trained
    on `train` by a loop of its own."""
    encoder, draw = small_encoder(seed=1), Seed(5).torch()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Linear(encoder.width, 4)
    network = encoder.module.train()
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(10):
        for rows in torch.randperm(len(train), generator=draw).split(50):
            loss = nn.functional.cross_entropy(head(network(train.inputs[rows].float() / 255)), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        clean, hit = (
            head(network(one.inputs[torch.arange(len(test))].float() / 255)).argmax(1)
            for one in (test, triggered(test, trigger, Seed(2)))
        )
    right, n = metrics.accuracy(clean, test.labels)
    hits, m = metrics.attack_success_rate(hit, test.labels, 1)
    return right / n, hits / m


@pytest.mark.full
@pytest.mark.parametrize("attack", [BadNets(), Blended()], ids=["badnets", "blended"])
def test_a_network_trained_on_it_obeys_the_trigger(attack: Any) -> None:
    train, test = blobs(2000), blobs(400, seed=1)
    made = attack.poison(train, attacker(1), Seed(0))
    trigger = made.goals[0].trigger
    accuracy, success = rates(made.data, test, trigger)
    assert accuracy > 0.95
    assert success >= 0.8
    accuracy, success = rates(train, test, trigger)
    assert accuracy > 0.95
    assert success <= 0.2
