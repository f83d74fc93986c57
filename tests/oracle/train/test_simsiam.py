"""SimSiam: a step written out, the stop-gradient, the predictor's rate, resume, and a smoke run."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from cupel.encoders import Fast
from cupel.losses import simsiam_loss
from cupel.pretrain.simsiam import SimSiam
from cupel.seeds import Seed
from pretraining import assert_resumes_bit_equal, assert_steps_count_what_moves, batch, smoke, trained
from toys import blobs, small_encoder

TINY = SimSiam(
    steps=6, batch_size=16, projection=6, projector_width=12, predictor_width=4, precision="fp32", optimizer="sgd",
    lr=0.05,
)  # fmt: skip


@pytest.mark.parametrize("apart", [False, True])
def test_a_step_by_hand(apart: bool) -> None:
    settings = dataclasses.replace(TINY, separate_views=apart)
    learner = settings.learner(small_encoder(), blobs(64), Seed(0))
    encoder, projector, predictor = (
        copy.deepcopy(learner.state[name]) for name in ("encoder", "projector", "predictor")
    )
    loss, _ = learner.loss(batch())
    x = settings.views(batch())
    parts = list(x.chunk(2)) if apart else [x]
    z = [projector(encoder(one)) for one in parts]
    p1, p2 = torch.cat([predictor(one) for one in z]).chunk(2)
    z1, z2 = torch.cat(z).chunk(2)
    literal = simsiam_loss(p1, p2, z1, z2)
    torch.testing.assert_close(loss, literal)
    loss.backward()
    # targets as constants, so all gradient comes through the predictor
    fixed1, fixed2 = z1.detach().clone(), z2.detach().clone()
    cosine = torch.nn.functional.cosine_similarity
    (-0.5 * (cosine(p1, fixed2).mean() + cosine(p2, fixed1).mean())).backward()
    for mine, theirs in zip(learner.state["projector"].parameters(), projector.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
@pytest.mark.parametrize("steady", [True, False])
def test_the_predictors_rate(monkeypatch: pytest.MonkeyPatch, optimizer: str, steady: bool) -> None:
    settings = dataclasses.replace(TINY, steps=5, warmup_steps=2, steady_predictor=steady, optimizer=optimizer)
    made, rates = [], []
    build = SimSiam.make_optimizer
    monkeypatch.setattr(SimSiam, "make_optimizer", lambda self, given: made.append(build(self, given)) or made[-1])

    def watch() -> dict[str, float]:
        rates.append([group["lr"] for group in made[0].param_groups])
        return {}

    _, learner, _ = trained(settings, blobs(64), Fast(width=4, input_size=16), watch=watch, watch_every=1)
    expected = [settings.lr_at(t, 5) for t in range(5)]
    assert [one[0] for one in rates] == pytest.approx(expected)
    assert len(rates[0]) == 1 + steady
    if steady:
        assert [one[1] for one in rates] == [0.05] * 5
        steadied = {id(one) for one in made[0].param_groups[1]["params"]}
        assert steadied == {id(one) for one in learner.predictor.parameters()}
    grouped = [id(one) for group in made[0].param_groups for one in group["params"]]
    assert sorted(grouped) == sorted(id(one) for one in learner.parameters())


def test_contract() -> None:
    assert_steps_count_what_moves(TINY)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume(tmp_path, optimizer: str) -> None:
    assert_resumes_bit_equal(dataclasses.replace(TINY, optimizer=optimizer, precision="bf16"), tmp_path)


def test_presets() -> None:
    solo, ctrl = SimSiam.preset("solo_cifar"), SimSiam.preset("ctrl")
    assert (solo.optimizer, solo.lr, solo.weight_decay, solo.epochs, solo.warmup_from) == (
        "sgd",
        0.5,
        1e-5,
        1000,
        0.003,
    )
    assert (solo.projection, solo.projector_width, solo.predictor_width) == (2048, 2048, 512)
    assert (ctrl.lr, ctrl.weight_decay, ctrl.batch_size, ctrl.epochs) == (0.06, 5e-4, 512, 800)


@pytest.mark.full
def test_three_epochs_learn_something() -> None:
    made = smoke(SimSiam.preset("fast"))
    print(made)
    assert made["late"] < made["early"]
    assert made["projection_std"] > 0.3
    assert made["knn"] >= made["random"] + 0.03
