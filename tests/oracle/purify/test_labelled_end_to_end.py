"""Every purifier with labels on a classifier of digits that BadNets or Blended poisoned: accuracy and attack success.

Bounds are loose: they tell a method that works from one that does nothing or destroys the classifier.
"""

import functools
from typing import Any

import pytest
import torch

from cupel import data as sources
from cupel.attack.badnets import BadNets
from cupel.attack.blended import Blended
from cupel.encoders import Fast
from cupel.inference import FrozenProbe, classify, features, triggered
from cupel.metrics import attack_success_rate
from cupel.pretrain.supervised import Supervised
from cupel.probe import Linear
from cupel.purify.abl import ABL
from cupel.purify.anp import ANP
from cupel.purify.fine_pruning import FinePruning
from cupel.purify.ft_sam import FTSAM
from cupel.purify.ibau import IBAU
from cupel.purify.nad import NAD
from cupel.purify.tuning import FST, FT, LP, FETuning, FTInit
from cupel.seeds import Seed
from cupel.train import fit
from cupel.types import Dataset, Goal, Knowledge, Poisoned
from fingerprints import same_state

pytestmark = pytest.mark.full

PLAIN: dict[str, Any] = {"batch_size": 32, "augment": None}  # flipped digits are no digits


@functools.cache
def images() -> tuple[Dataset, Dataset, Dataset]:
    """1,000 for the victim, 200 clean ones for the defender, and the test images."""
    train, test = sources.load("digits"), sources.load("digits", split="test")
    order = torch.randperm(len(train), generator=Seed(9).torch())
    return train.subset(order[:1000].sort().values), train.subset(order[1000:1200].sort().values), test


@functools.cache
def victim(attack: str) -> tuple[FrozenProbe, Poisoned]:
    """A classifier whose class 1 is the target, with a tenth of its training images poisoned."""
    method = {"badnets": BadNets, "blended": Blended}[attack](poison_rate=0.1)
    made = method.poison(images()[0], Knowledge((Goal(None, None, "digits", 1),)), Seed(0))
    encoder = Fast(width=8, input_size=16).build(Seed(0))
    recipe = Supervised(optimizer="adamw", lr=2e-3, steps=250, batch_size=64, augment=None, precision="fp32")
    learner = recipe.learner(encoder, made.data, Seed(1))
    fit(learner, made.data, recipe, Seed(2), label="victim")
    encoder.module.eval()
    return FrozenProbe(encoder, learner.head.eval()), made


def judged(model: FrozenProbe, attack: str) -> tuple[float, float]:
    """Clean accuracy, attack success rate."""
    test, goal = images()[2], victim(attack)[1].goals[0]
    assert goal.trigger is not None

    def predicted(data: Dataset) -> torch.Tensor:
        return classify(model.head, features(model.encoder, data, dtype=torch.float32, store=False))

    hits, n = attack_success_rate(predicted(triggered(test, goal.trigger, Seed(0))), test.labels, 1)
    return float((predicted(test) == test.labels).float().mean()), hits / n


def purified(settings: Any, attack: str = "badnets") -> tuple[float, float]:
    made, _ = settings.purify_classifier(victim(attack)[0], images()[1], Seed(0))
    return judged(made, attack)


@pytest.mark.parametrize("attack", ["badnets", "blended"])
def test_the_victims_are_victims(attack: str) -> None:
    accuracy, success = judged(victim(attack)[0], attack)
    assert accuracy > 0.95
    assert success > 0.9


@pytest.mark.parametrize("attack", ["badnets", "blended"])
def test_fst_lowers_the_attack_where_ft_does_not(attack: str) -> None:
    accuracy, success = purified(FST(**PLAIN), attack)
    assert accuracy > 0.88
    assert success < 0.4
    assert success < purified(FT(**PLAIN), attack)[1] - 0.2


@pytest.mark.parametrize(
    ("settings", "at_least", "below"),
    [
        pytest.param(FTSAM(**PLAIN, epochs=8), 0.85, 0.5, id="ft_sam"),
        pytest.param(IBAU(**PLAIN, lr=1e-3), 0.85, 0.5, id="ibau"),
        pytest.param(FinePruning(**PLAIN, epochs=8, lr=0.002), 0.88, 0.9, id="fine_pruning"),
        pytest.param(FTInit(**PLAIN), 0.9, 0.93, id="ft_init"),
        pytest.param(FETuning(**PLAIN), 0.75, 0.8, id="fe_tuning"),
        pytest.param(
            NAD(**PLAIN, epochs=8, teacher_epochs=5, betas=(5.0, 10.0, 10.0), batch_norm="train"), 0.9, 0.97, id="nad"
        ),
    ],
)
def test_badnets_grows_weaker_and_the_classifier_stays(settings: Any, at_least: float, below: float) -> None:
    accuracy, success = purified(settings)
    assert accuracy > at_least
    assert success < below


def test_anp_prunes_what_noise_excites_and_keeps_the_accuracy() -> None:
    """On so small a network channels are not the backdoor's alone, and the attack survives."""
    made, history = ANP(**PLAIN, steps=100, lr=0.02).purify_classifier(victim("badnets")[0], images()[1], Seed(0))
    assert judged(made, "badnets")[0] > 0.88
    assert history["noisy"][-1] < history["noisy"][0]
    assert history["held_out"][-1] >= 0.9


def test_lp_is_a_new_head() -> None:
    made, _ = LP(**PLAIN).purify_classifier(victim("badnets")[0], images()[1], Seed(0))
    assert same_state(made.encoder.module, victim("badnets")[0].encoder.module)
    assert judged(made, "badnets")[0] > 0.95


def test_abl_isolates_poisoned_images_and_unlearns_them() -> None:
    model, poisoned = victim("badnets")
    settings = ABL(isolation_epochs=3, epochs=10, unlearning_epochs=12, batch_size=64, augment=None, lr=0.05)
    made, history = settings.purify_classifier(model, poisoned.data, Seed(0))
    isolated = {int(row) for row in history["isolated"]}
    assert len(isolated) == 10
    assert len(isolated & set(poisoned.rows.tolist())) >= 8
    accuracy, success = judged(made, "badnets")
    assert accuracy > 0.85
    assert success < 0.5


def test_an_encoder_under_a_new_head_gains_too() -> None:
    """Heads fitted on the defender's images, to the encoder as it was and as it came out."""
    model, _ = victim("badnets")
    made = FST(**PLAIN).purify(model.encoder, images()[1], Seed(0))
    before, after = (judged(Linear().fit(one, images()[1], Seed(3)), "badnets") for one in (model.encoder, made))
    assert after[0] > 0.88
    assert after[1] < before[1] - 0.2
