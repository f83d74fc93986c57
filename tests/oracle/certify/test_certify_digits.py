"""PatchGuard against BadEncoder on handwritten digits: answers stand under the trigger, certificates are scarce."""

import pytest

import digits
from cupel.attack.badencoder import BadEncoder
from cupel.certify import PatchGuard, measure
from cupel.inference import triggered
from cupel.seeds import Seed
from cupel.triggers import Patch


@pytest.mark.slow
def test_patchguard_against_badencoder() -> None:
    one, trigger = digits.victim(), Patch(size=4)
    attack = BadEncoder(
        trigger=trigger, steps=250, batch_size=128, optimizer="adamw", lr=1e-3, warmup_steps=25, l1_draws=32
    )
    done = attack.implant(one.encoder, one.attacker(), Seed(0))
    assert digits.outcome(done.model, done.goals[0])[1] >= 0.95
    method = PatchGuard(patch=4, kernels=(3, 3, 1), strides=(1, 1, 1), width=16, steps=200, head_epochs=20)
    guarded = method.fit(done.model, one.train, Seed(0), unlabelled=one.shadow.without_labels("the student"))
    found = {k: a / b for k, (a, b) in measure(guarded, one.test, triggered(one.test, trigger, Seed(0)), 1).items()}
    assert found["clean_accuracy"] >= 0.8
    assert found["attack_success_rate"] <= 0.1
    assert found["robust_accuracy"] >= 0.75
    assert found["certified_accuracy"] <= 0.3  # a window is a quarter of the map, and the mask takes another
