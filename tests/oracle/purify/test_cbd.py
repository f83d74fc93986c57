"""CBD on the planted toy, where the backdoor is known, and on a small untrained CNN, where only the mechanics are."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cupel.encoders import Fast, ImageEncoder
from cupel.errors import CupelError, DataError, Interrupted, SettingsError, UsageError
from cupel.inference import features
from cupel.inversion import concentration
from cupel.progress import request_stop
from cupel.protocols import Batch, Encoder
from cupel.purify import CBD, PURIFIERS
from cupel.purify.cbd_learner import CBDLearner
from cupel.purify.evidence import usable_evidence
from cupel.purify.screening import screened
from cupel.scan import Decree
from cupel.seeds import Seed
from cupel.types import Dataset
from cupel.verdicts import Evidence
from planted import Planted, PlantedEncoder, planted, unit

PLAIN: dict[str, Any] = {  # plain SGD on the toy's two weights
    "optimizer": "sgd", "momentum": 0.0, "lr": 5e-4, "schedule": "constant", "steps": None, "epochs": 30,
    "batch_size": 64, "pull": "nmse", "augmented_anchor": False, "precision": "fp32",
}  # fmt: skip
SHORT: dict[str, Any] = {"steps": 4, "batch_size": 16, "lr": 0.01}


@pytest.fixture(scope="module")
def toy() -> Planted:
    return planted(40, 0.9, seed=0)


@pytest.fixture
def cnn() -> ImageEncoder:
    encoder = Fast(width=4, input_size=16).build(Seed(0))
    with torch.no_grad():  # statistics and affine parts worth changing
        for i, part in enumerate(m for m in encoder.module.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            generator = Seed(i).torch()
            part.get_buffer("running_mean").normal_(0, 0.1, generator=generator)
            part.weight.uniform_(0.5, 1.5, generator=generator)
    return encoder


def truth(toy: Planted, opacity: float = 0.9) -> Evidence:
    mask = (opacity * toy.mask).numpy()
    return Evidence(mask, toy.pattern.numpy(), float(mask.mean()), True, "truth")


def shift(encoder: Encoder, toy: Planted) -> float:
    """1 − cos between triggered and clean embeddings of an image."""
    x = unit(toy.images.inputs)
    with torch.no_grad():
        return float((1 - F.cosine_similarity(encoder(toy.stamp(x)), encoder(x))).mean())


def agreement(a: Encoder, b: Encoder, toy: Planted) -> float:
    x = unit(toy.images.inputs)
    with torch.no_grad():
        return float(F.cosine_similarity(a(x), b(x)).mean())


def learner(settings: CBD, encoder: Encoder, data: Dataset, *evidence: Evidence) -> CBDLearner:
    triggers = usable_evidence(evidence, encoder.input_size, None)
    return CBDLearner(settings, encoder, encoder, features(encoder, data, dtype=torch.float32), triggers, Seed(3))


def first_batch(data: Dataset, n: int = 32) -> Batch:
    rows = torch.arange(n)
    assert isinstance(data.inputs, Tensor)
    return Batch(data.inputs[rows], rows, Seed(4))


def weights(encoder: Encoder) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in encoder.module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_true_trigger_as_evidence_removes_the_planted_backdoor(toy: Planted) -> None:
    method = CBD(**PLAIN, mode="inverted", boost=(1.0, 1.0), shift=0, dilation=0)
    purified, history = method.purify_with_history(toy.encoder, toy.images, Seed(1), [truth(toy)])
    assert shift(toy.encoder, toy) > 0.9
    assert shift(purified, toy) < shift(toy.encoder, toy) / 5
    assert agreement(purified, toy.encoder, toy) > 0.95
    assert agreement(purified, toy.twin, toy) > 0.95
    assert len(history["loss"]) == 120
    assert history["pull"][-1] < history["pull"][0] / 1000
    assert set(history) == {"loss", "pull", "anchor", "feature_std"}


def test_blind_adversaries_do_not_reach_the_planted_backdoor(toy: Planted) -> None:
    """The gate is shut around clean images, so its gradient is nought: the toy's documented blind spot."""
    x = unit(toy.images.inputs)
    with torch.no_grad():
        centre = F.normalize(toy.encoder(toy.stamp(x)), dim=1).mean(dim=0, keepdim=True)
    reach = {}
    for mode in ("inverted", "pgd-linf", "universal"):
        one = learner(CBD(**PLAIN, mode=mode, epsilon=51 / 255, boost=(1.0, 1.0), shift=0, dilation=0), toy.encoder,
                      toy.images, truth(toy))  # fmt: skip
        with torch.no_grad():
            stand_ins = one.adversaries(x, one.clean, Seed(5))
            reach[mode] = float(F.cosine_similarity(toy.encoder(stand_ins), centre).mean())
    assert reach["inverted"] > 0.95
    assert max(reach["pgd-linf"], reach["universal"]) < 0.3


@pytest.mark.parametrize("inner", ["infonce", "neg_cos"])
@pytest.mark.parametrize("mode", ["pgd-linf", "universal", "patch"])
def test_stand_ins_move_embeddings_further_than_random_ones(
    cnn: ImageEncoder, toy: Planted, mode: Any, inner: Any
) -> None:
    batch = first_batch(toy.images)
    x, moved = unit(batch.inputs), []
    for steps in (0, 5):
        one = learner(CBD(mode=mode, pgd_steps=steps, inner=inner), cnn, toy.images)
        stand_ins = one.adversaries(x, one.clean[:32], Seed(0))
        assert not stand_ins.requires_grad
        assert 0 <= float(stand_ins.min()) <= float(stand_ins.max()) <= 1
        with torch.no_grad():
            moved.append(float((1 - F.cosine_similarity(cnn(stand_ins), one.clean[:32])).mean()))
    assert moved[1] > 1.2 * moved[0]
    assert all(weight.grad is None for weight in cnn.module.parameters())


def test_mix_gives_each_kind_its_share(cnn: ImageEncoder, toy: Planted) -> None:
    x = unit(first_batch(toy.images).inputs)
    settings = CBD(mode="mix", pgd_steps=1, epsilon=0.1, boost=(1.0, 1.0), shift=0, dilation=0, num_patches=None)
    one = learner(settings, cnn, toy.images, truth(toy))
    changed = one.adversaries(x, one.clean[:32], Seed(0)) - x
    outside = changed.masked_fill(toy.mask.bool(), 0)
    assert float(outside[:16].abs().max()) == 0  # the trigger's place alone
    torch.testing.assert_close((x + changed)[:16], toy.stamp(x[:16], 0.9))
    touched = (changed != 0).any(dim=1).sum(dim=(1, 2))
    assert int(touched[16:24].max()) <= 9  # 20 % of 16 pixels, squared
    assert int(touched[24:].min()) > 200
    assert float(changed[24:].abs().max()) <= 0.1 + 1e-6
    without = learner(settings, cnn, toy.images)
    before = without.universal.delta.clone()
    blind = without.adversaries(x, without.clean[:32], Seed(0)) - x
    assert float(blind[:16].abs().max()) <= 0.1 + 1e-6
    assert not torch.equal(without.universal.delta, before)  # warm start of the next step


def test_without_perturbation_both_terms_agree(toy: Planted) -> None:
    settings = CBD(mode="pgd-linf", epsilon=0.0, augmented_anchor=False, precision="fp32")
    encoder = PlantedEncoder(toy.encoder.module)
    one = learner(settings, encoder, toy.images)
    one.clean = one.clean.roll(1, 0)  # wrong targets, so that the terms are not nought
    _, numbers = one.loss(first_batch(toy.images))
    pull, anchor = numbers["pull"].item(), numbers["anchor"].item()
    assert pull > 0.1
    assert pull == anchor


@pytest.mark.parametrize("pull", ["cosine", "nmse", "cosine+nmse", "whitened"])
def test_the_anchor_is_nought_at_the_first_step(cnn: ImageEncoder, toy: Planted, pull: Any) -> None:
    _, numbers = learner(CBD(pull=pull), cnn, toy.images).loss(first_batch(toy.images))
    assert abs(numbers["anchor"].item()) < 1e-6
    assert numbers["pull"].item() > 1e-4


def test_augmented_views_have_the_frozen_embedding_of_the_same_view(cnn: ImageEncoder, toy: Planted) -> None:
    batch = first_batch(toy.images)
    plain, own = unit(batch.inputs), features(cnn, batch.inputs, dtype=torch.float32)
    x, target = learner(CBD(anchor_views=2), cnn, toy.images).anchors(batch.inputs, plain, own, batch.seed)
    assert len(x) == 32 + 2 * 32
    with torch.no_grad():
        torch.testing.assert_close(target, cnn(x), atol=1e-6, rtol=1e-5)
    assert torch.equal(x[:16], plain[0::2])
    assert not any((x[16:] == one).all(dim=(1, 2, 3)).any() for one in plain)
    bare, same_target = learner(CBD(augmented_anchor=False), cnn, toy.images).anchors(
        batch.inputs, plain, own, batch.seed
    )
    assert torch.equal(bare, plain)
    assert torch.equal(same_target, own)


@pytest.mark.parametrize("mode", ["frozen", "eval_affine"])
def test_batchnorm_statistics_never_move(cnn: ImageEncoder, toy: Planted, mode: Any) -> None:
    before = weights(cnn)
    purified = CBD(**SHORT, batch_norm=mode).purify(cnn, toy.images, Seed(0))
    assert same(before, weights(cnn))
    after = weights(purified)
    for name in before:
        buffer, affine = "running" in name or "num_batches" in name, ".bn" in name or "downsample.1" in name
        if buffer or (affine and mode == "frozen"):
            assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["backbone.conv1.weight"], after["backbone.conv1.weight"])
    assert torch.equal(before["backbone.bn1.weight"], after["backbone.bn1.weight"]) == (mode == "frozen")
    assert all((weight.requires_grad and weight.grad is None) for weight in purified.module.parameters())


def test_the_given_encoder_stays_and_labels_are_not_touched(cnn: ImageEncoder, toy: Planted) -> None:
    cnn.module.train().requires_grad_(False)
    before = weights(cnn)
    purified = CBD(**SHORT).purify(cnn, toy.images.without_labels("cbd"), Seed(0))
    assert same(before, weights(cnn))
    assert cnn.module.training
    assert not any(weight.requires_grad or weight.grad is not None for weight in cnn.module.parameters())
    assert not purified.module.training
    assert all(weight.requires_grad for weight in purified.module.parameters())
    assert not same(before, weights(purified))


def test_the_seed_decides(cnn: ImageEncoder, toy: Planted) -> None:
    runs = [weights(CBD(**SHORT).purify(cnn, toy.images, Seed(seed))) for seed in (0, 0, 1)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_no_steps_change_nothing(cnn: ImageEncoder, toy: Planted) -> None:
    purified, history = CBD(steps=0).purify_with_history(cnn, toy.images, Seed(0))
    assert purified is not cnn
    assert history == {}
    x = unit(first_batch(toy.images).inputs)
    with torch.no_grad():
        assert torch.equal(purified(x), cnn(x))


def test_a_resumed_run_equals_the_unbroken_one(
    cnn: ImageEncoder, toy: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = CBD(**SHORT)  # without evidence half of the batch is universal, whose perturbation is kept over the steps
    whole, whole_history = method.purify_with_history(cnn, toy.images, Seed(0))
    file = tmp_path / "state.safetensors"
    after_step = CBDLearner.after_step

    def stop_after_two(self: CBDLearner) -> None:
        after_step(self)
        if self._done == 2:
            request_stop(2)

    with monkeypatch.context() as patch:
        patch.setattr(CBDLearner, "after_step", stop_after_two)
        try:
            with pytest.raises(Interrupted):
                method.purify_with_history(cnn, toy.images, Seed(0), checkpoint=file)
        finally:
            request_stop(None)
    assert file.exists()
    resumed, history = method.purify_with_history(cnn, toy.images, Seed(0), checkpoint=file)
    assert same(weights(whole), weights(resumed))
    assert history == whole_history


def test_a_collapse_is_an_error(cnn: ImageEncoder, toy: Planted) -> None:
    """Nothing holds the embeddings: a constant encoder is the minimum, and the pull finds it."""
    bad = CBD(mode="pgd-linf", epsilon=0.1, anchor="self", lambda_anchor=0.0, pull="cosine", augmented_anchor=False,
              batch_norm="eval_affine", steps=40, batch_size=32, lr=0.5, schedule="constant")  # fmt: skip
    with pytest.raises(CupelError, match="embeddings collapse") as caught:
        bad.purify(cnn, toy.images, Seed(0))
    assert "anchor" in caught.value.todo
    held = dataclasses.replace(bad, anchor="frozen", lambda_anchor=1.0, pull="whitened", lr=0.01)
    _, history = held.purify_with_history(cnn, toy.images, Seed(0))
    assert history["feature_std"][-1] > 0.5 * history["feature_std"][0]


def test_evidence_that_does_not_fit_or_did_not_converge(cnn: ImageEncoder, toy: Planted) -> None:
    good = truth(toy)
    small = dataclasses.replace(good, mask=np.zeros((8, 8), np.float32), pattern=np.zeros((3, 8, 8), np.float32))
    with pytest.raises(DataError, match="8×8"):
        CBD(**SHORT).purify(cnn, toy.images, Seed(0), [small])
    failed = dataclasses.replace(good, converged=False)
    with pytest.raises(DataError, match="no converged trigger"):
        CBD(**SHORT, mode="inverted").purify(cnn, toy.images, Seed(0), [failed])
    assert same(
        weights(CBD(**SHORT).purify(cnn, toy.images, Seed(0), [failed])),
        weights(CBD(**SHORT).purify(cnn, toy.images, Seed(0))),
    )


def test_evidence_much_larger_than_the_smallest_is_left_out(cnn: ImageEncoder, toy: Planted) -> None:
    good = truth(toy)
    huge = dataclasses.replace(good, mask=np.ones((16, 16), np.float32), size=1.0)

    def purified(*evidence: Evidence, ratio: float | None = 4.0) -> dict[str, Tensor]:
        return weights(CBD(**SHORT, evidence_ratio=ratio).purify(cnn, toy.images, Seed(0), evidence))

    assert same(purified(good, huge), purified(good))
    assert not same(purified(good, huge, ratio=None), purified(good))


def test_triggered_images_among_the_unlabelled_are_screened_out(toy: Planted) -> None:
    raw, bears = torch.as_tensor(toy.images.inputs).clone(), torch.arange(len(toy.images)) % 20 == 7
    raw[bears] = toy.stamp(unit(raw[bears])).mul(255).round().to(torch.uint8)
    mixed = toy.images.with_inputs(raw, "mixed")
    triggers = usable_evidence([truth(toy)], toy.encoder.input_size, None)
    assert triggers is not None
    left = screened(toy.encoder, mixed, triggers, 0.2)
    assert left.ids.tolist() == mixed.ids[~bears].tolist()
    assert screened(toy.encoder, mixed, triggers, 0.02) is mixed, "more than the share: the place is no sign"
    assert screened(toy.encoder, mixed, triggers, 0.0) is mixed
    assert screened(toy.encoder, toy.images, triggers, 0.2) is toy.images
    method = CBD(**PLAIN, mode="inverted", boost=(1.0, 1.0), shift=0, dilation=0)
    kept = shift(method.purify(toy.encoder, mixed, Seed(0), [truth(toy)]), toy)
    cured = dataclasses.replace(method, screen=0.2).purify(toy.encoder, mixed, Seed(0), [truth(toy)])
    assert shift(cured, toy) < kept


def test_too_few_images_and_wrong_size(cnn: ImageEncoder, toy: Planted) -> None:
    with pytest.raises(DataError, match="one batch needs 64"):
        CBD().purify(cnn, toy.images.subset(torch.arange(20)), Seed(0))
    large = toy.images.with_inputs(torch.zeros(256, 3, 32, 32, dtype=torch.uint8), "large")
    with pytest.raises(DataError, match="32×32"):
        CBD().purify(cnn, large, Seed(0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mix": (0.5, 0.5, 0.5)}, "add up to 1.5"),
        ({"window": (0.3, 0.1)}, "0.3 is above 0.1"),
        ({"boost": (3.0, 0.7)}, "3 is above 0.7"),
        ({"epsilon": 8.0}, "less than or equal to 1"),
        ({"mode": "pgd"}, "pgd-linf"),
        ({"lamda_pull": 1.0}, "did you mean 'lambda_pull'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        CBD(**settings)


def test_presets() -> None:
    cbd: Any = PURIFIERS["cbd"]
    assert {name: cbd.preset(name).mode for name in ("smoke", "standard", "paper")} == {
        "smoke": "mix", "standard": "mix", "paper": "pgd-linf",
    }  # fmt: skip
    with pytest.raises(UsageError, match="did you mean 'smoke'"):
        CBD.preset("smok")
    assert CBD.needs == frozenset()
    assert CBD.title == "CBD (re-implementation)"


@pytest.mark.full
def test_scan_then_boosted_pulling_silences_the_true_trigger() -> None:
    """What the scanner finds is fainter than the trigger; only boosted evidence carries over to the real one.

    No shifts: the toy's gate looks at one place, unlike a convolution.
    """
    toy = planted(30, 0.85, seed=0)
    verdict = Decree(num_seeds=5, steps=600, batch_size=64).scan(toy.encoder, toy.images, Seed(0))
    assert min(e.size for e in verdict.evidence) < 0.05
    x = toy.stamp(unit(toy.images.inputs))

    def triggered(encoder: Encoder) -> float:
        with torch.no_grad():
            return float(concentration(encoder(x)))

    assert triggered(toy.encoder) > 0.95
    purified = CBD(**PLAIN, mode="inverted", shift=0).purify(toy.encoder, toy.images, Seed(0), verdict.evidence)
    faint = CBD(**PLAIN, mode="inverted", shift=0, dilation=0, boost=(1.0, 1.0))
    assert triggered(faint.purify(toy.encoder, toy.images, Seed(0), verdict.evidence)) > 0.7
    assert triggered(purified) < triggered(toy.twin) + 0.15
    assert agreement(purified, toy.twin, toy) > 0.99
