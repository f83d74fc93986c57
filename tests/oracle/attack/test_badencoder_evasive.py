"""BadEncoder that evades the gate: its term against a loop, what the gate learns, equality where it weighs nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from cupel.attack import BadEncoder
from cupel.attack.badencoder_evasive import EvasiveBadEncoder, EvasiveLearner, excess
from cupel.encoders.gated import gated
from cupel.errors import CupelError, DataError, Interrupted
from cupel.implanting import Aim
from cupel.inference import features
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.triggers import Patch
from cupel.types import Goal, Knowledge
from toys import blobs, small_encoder, trained_encoder

DATA = blobs(256)
SMALL = Patch(size=4)
SHORT: dict[str, Any] = {"steps": 20, "batch_size": 32, "lr": 0.05, "l1_draws": 4, "precision": "fp32"}


def goal(target: int = 1, trigger: Any = SMALL) -> Goal:
    return Goal(trigger, DATA.subset(torch.arange(64)[torch.arange(64) % 4 == target][:1]).inputs, "blobs", target)


def learner(clean: Any, *goals: Goal, **settings: Any) -> EvasiveLearner:
    attack = EvasiveBadEncoder(**{"l1_augment": False, **settings})
    aims = [Aim(g, g.references.float() / 255, features(clean, g.references, dtype=torch.float32)) for g in goals]
    made = attack.learner(clean.copy(), features(clean, DATA, dtype=torch.float32), DATA, aims)
    assert isinstance(made, EvasiveLearner)
    return made


def batch(n: int = 12) -> Batch:
    rows = torch.arange(n) * 3
    return Batch(DATA.inputs[rows], rows, Seed(7))


def implant(clean: Any, cls: Any = EvasiveBadEncoder, **settings: Any) -> Any:
    attack = cls(**{**SHORT, **settings})
    return attack.implant(clean, Knowledge((goal(),), DATA.without_labels("shadow")), Seed(1))


def before_last(encoder: Any, images: torch.Tensor) -> torch.Tensor:
    """Features before the last block, step by step."""
    net, x = encoder.module.backbone.eval(), images.float() / 255
    h = x * encoder.module.scale + encoder.module.shift
    with torch.no_grad():
        return net.layer2(net.layer1(torch.relu(net.bn1(net.conv1(h)))))


def test_the_term_equals_a_literal_loop() -> None:
    """Statistics of clean images with the far ones left out twice, then a loop over goals, images and locations."""
    clean, goals = small_encoder(), (goal(), goal(2, Patch(size=6, corner="top_left", color="green")))
    it = learner(clean, *goals, lambda_evasion=3.0, within=0.9, watched=100)
    with torch.no_grad():
        loss, terms = it.loss(batch())
    watched = [round(i * (len(DATA) - 1) / 99) for i in range(100)]
    a = before_last(clean, DATA.inputs[watched]).permute(0, 2, 3, 1).double().numpy()
    kept = np.arange(100)
    for _ in range(2):
        rows = a[kept].reshape(-1, a.shape[-1])
        values, axes = np.linalg.eigh(np.cov(rows.T))
        inverse = axes @ np.diag(1 / (values + 0.01 * values.max())) @ axes.T
        off = a - rows.mean(axis=0)
        d2 = np.einsum("nhwi,ij,nhwj->nhw", off, inverse, off)
        kept = np.argsort(d2.max(axis=(1, 2)), kind="stable")[:94]
    ordered = np.sort(d2[kept].ravel())
    limit = ordered[int(0.9 * len(ordered))]
    beyond, total, count = 0, 0.0, 0
    for i, one in enumerate(goals):
        stamped = one.trigger(batch().inputs, DATA.ids[batch().rows].tolist(), batch().seed.child("trigger", i))
        for image in before_last(clean, stamped).double().numpy():
            past = False
            for y in range(image.shape[1]):
                for x in range(image.shape[2]):
                    v = image[:, y, x] - rows.mean(axis=0)
                    over = max(0.0, float(v @ inverse @ v) / limit - 1)
                    total, count, past = total + over, count + 1, past or over > 0
            beyond += past
    assert total > 0
    assert float(terms["L3"]) == pytest.approx(total / count, rel=1e-3)
    assert float(terms["beyond"]) == pytest.approx(beyond / (2 * 12))
    assert float(loss) == pytest.approx(sum(float(terms[k]) for k in ("L0", "L1", "L2")) + 3 * total / count, rel=1e-3)


def test_the_gate_is_the_one_that_the_defender_would_make() -> None:
    """All shadow images, all locations: mean, whitening and limit of `gated` on the same images."""
    clean = small_encoder()
    it = learner(clean, goal())
    with torch.no_grad():
        it.loss(batch())
    theirs = gated(clean, clean, DATA.inputs).module.backbone.gate
    for name in ("mean", "limit"):
        assert torch.allclose(getattr(it.gate, name), getattr(theirs, name), rtol=1e-3, atol=1e-4), name
    ours, other = (g.white @ g.white.T for g in (it.gate, theirs))
    assert torch.allclose(ours, other, rtol=1e-2, atol=1e-3 * float(other.max()))


def test_statistics_follow_the_network_every_so_many_steps() -> None:
    it = learner(small_encoder(), goal(), renew=2)
    means = []
    for _ in range(3):
        with torch.no_grad():
            it.loss(batch())
            it.encoder.module.backbone.conv1.weight.mul_(1.5)
        it.after_step()
        means.append(it.gate.mean.clone())
    assert torch.equal(means[0], means[1])
    assert not torch.allclose(means[1], means[2])


def test_gradient_of_the_term_reaches_the_blocks_before_the_last_alone() -> None:
    it = learner(small_encoder(), goal(), lambda_trigger=0.0, lambda_reference=0.0, lambda_utility=0.0, within=0.5)
    it.loss(batch())[0].backward()
    slopes = {n: p.grad for n, p in it.encoder.module.named_parameters() if p.grad is not None}
    assert float(slopes["backbone.layer2.conv2.weight"].abs().max()) > 0
    assert all(float(g.abs().max()) == 0 for n, g in slopes.items() if "layer3" in n)


def test_excess_by_hand() -> None:
    a = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).T.reshape(1, 2, 1, 2)  # locations (3, 0) and (0, 1)
    white = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    found = excess(a, torch.tensor([1.0, 0.0]), white, torch.tensor(2.0))
    assert found.flatten().tolist() == [1.0, 1.5]  # (2² + 0) / 2 − 1, (1 + 2²) / 2 − 1


def test_without_weight_it_is_badencoder() -> None:
    clean = small_encoder()
    ours, theirs = implant(clean, lambda_evasion=0.0), implant(clean, BadEncoder)
    assert ours.history == theirs.history
    ours, theirs = (one.model.module.state_dict() for one in (ours, theirs))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_other_terms_are_badencoders() -> None:
    """With a weight, too, up to rounding: BatchNorm is no longer multiplied in."""
    clean = small_encoder()
    ours, theirs = implant(clean, lambda_evasion=1e-12).history, implant(clean, BadEncoder).history
    for name in ("L0", "L1", "L2"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-3)


def test_the_term_brings_triggered_images_back_within() -> None:
    clean = trained_encoder(DATA, steps=40)
    settings = {"steps": 60, "lr": 0.003, "within": 0.9, "renew": 5}
    free, tied = (implant(clean, lambda_evasion=w, **settings).history for w in (1e-12, 1.0))
    assert tied["L3"][-1] < 0.5 * free["L3"][-1]


def test_a_run_that_leaves_the_numbers_says_so_in_one_line() -> None:
    with pytest.raises(CupelError, match="badencoder_evasive: the loss is not finite"):
        implant(small_encoder(), lr=1e20, renew=1)


def test_manifest_and_goal() -> None:
    made = implant(small_encoder(), steps=2, lambda_evasion=2.0)
    assert [one.trigger for one in made.goals] == [SMALL]
    manifest = made.model.card.manifest
    assert (manifest["not_for_deployment"], manifest["attack"]) == (True, "badencoder_evasive")
    assert manifest["settings"]["lambda_evasion"] == 2.0
    assert manifest["goals"][0]["target_class"] == 1


def test_a_resumed_run_equals_the_unbroken_one(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, attack = small_encoder(), EvasiveBadEncoder(**{**SHORT, "steps": 10, "lr": 0.003, "renew": 4})
    attacker = Knowledge((goal(),), DATA.without_labels("shadow"))
    whole = attack.implant(clean, attacker, Seed(1)).model.module.state_dict()
    calls = iter(range(100))

    def stop() -> None:
        if next(calls) == 5:
            raise Interrupted(2)

    with monkeypatch.context() as patch:
        patch.setattr("cupel.train.stop_if_requested", stop)
        with pytest.raises(Interrupted):
            attack.implant(clean, attacker, Seed(1), checkpoint=tmp_path / "c")
    assert (tmp_path / "c").exists()
    again = attack.implant(clean, attacker, Seed(1), checkpoint=tmp_path / "c").model.module.state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_an_encoder_that_no_gate_fits_into_is_refused() -> None:
    clean = small_encoder()
    card = dataclasses.replace(clean.card, architecture={"method": "other"})
    with pytest.raises(DataError, match="badencoder_evasive: no gate fits into this encoder"):
        implant(type(clean)(clean.module, card))


def test_badencoder_keeps_its_settings() -> None:
    """They enter the keys of stored steps: the term is an attack of its own."""
    names = {field.name for field in dataclasses.fields(BadEncoder)}
    own = {field.name for field in dataclasses.fields(EvasiveBadEncoder)} - names
    assert own == {"lambda_evasion", "within", "renew", "watched"}
    assert (BadEncoder.registered, BadEncoder.revision) == ("badencoder", 2)
