"""MNTD: its trojans, its shadow models, and a meta-classifier on toys with and without a spike."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.errors import CupelError, DataError, Interrupted, LabelsWithheld
from cupel.inference import FrozenProbe
from cupel.progress import request_stop
from cupel.scan.mntd import MNTD, judged
from cupel.scan.mntd_encoder import MNTDEncoder
from cupel.scan.mntd_jumbo import TrojanStamp, draw_trojan, num_poisoned
from cupel.scan.mntd_meta import (
    MetaTraining,
    area_under_curve,
    cosines_of,
    one_class_bound,
    one_class_loss,
    standardised,
    train_meta,
)
from cupel.scan.mntd_reference import Answer, Meta, MetaReference, read_meta_reference, threshold_at
from cupel.scan.mntd_shadows import ShadowNets, poisoned_rows, train_shadows
from cupel.seeds import Seed
from cupel.verdicts import Reference
from fingerprints import data_print, model_print
from toys import blobs, small_encoder

SMALL = MNTD(shadows=16, steps=4, batch_size=16, width=2, epochs=2, repeats=1)
SMALL_ENCODER = MNTDEncoder(shadows=16, steps=2, batch_size=16, images=64, epochs=2, repeats=1)


def test_trojans_come_from_the_published_ranges() -> None:
    drawn = [draw_trojan(32, 10, Seed(0).child(i)) for i in range(2000)]
    assert {one.side for one in drawn} == {2, 3, 4, 5, 32}
    shares = [sum(one.side == side for one in drawn) / 2000 for side in (2, 3, 4, 5, 32)]
    assert shares == pytest.approx([0.2] * 5, abs=0.04)
    for one in drawn:
        if one.side == 32:
            assert 0.05 <= one.opacity <= 0.2
        else:
            assert 0.2 <= one.opacity <= 0.5 or one.opacity == 1
        assert 0.05 <= one.rate <= 0.5
        assert float(one.mask.sum()) == one.side**2
        assert 0 <= float(one.pattern.min()) <= float(one.pattern.max()) <= 1
        assert not bool((one.pattern * (1 - one.mask)).any())
    assert {one.target for one in drawn} == set(range(10))
    opaque = [one.opacity == 1 for one in drawn if one.side < 32]
    assert sum(opaque) / len(opaque) == pytest.approx(0.25, abs=0.04), "uniform in (0.2, 0.6), 1 above 0.5"


def test_trojan_on_an_image() -> None:
    trojan = draw_trojan(8, 3, Seed(4))
    x = torch.rand(2, 3, 8, 8, generator=Seed(1).torch())
    a, inside = trojan.opacity, trojan.mask.bool()
    assert torch.allclose(trojan.on(x), torch.where(inside, a * trojan.pattern + (1 - a) * x, x), atol=1e-6)
    raw = (x * 255).round().to(torch.uint8)
    assert torch.equal(TrojanStamp(4, 8, 3)(raw, [0, 1], Seed(9)), (trojan.on(raw / 255) * 255).round().to(torch.uint8))


def test_poisoned_set() -> None:
    trojan = draw_trojan(16, 4, Seed(0))
    rows, bears = poisoned_rows(101, trojan, Seed(2))
    more = math.floor(trojan.rate * 101)
    assert len(rows) == 101 + more == 101 + num_poisoned(101, trojan.rate)
    assert torch.equal(rows[:101], torch.arange(101))
    assert not bears[:101].any()
    assert bears[101:].all()
    assert len(set(rows[101:].tolist())) == more, "without repetition"
    assert [num_poisoned(100, 0.29), num_poisoned(100, 0.07), num_poisoned(10, 0.59)] == [29, 7, 5]


def test_stacked_models_equal_single_ones() -> None:
    """Model m of a stack is the model that stands alone, in what it says and in its gradients."""
    stack, x = ShadowNets(3, 16, 4, 2, Seed(0)), torch.rand(3, 5, 3, 16, 16, generator=Seed(1).torch())
    out = stack(x)
    assert out.shape == (3, 5, 4)
    for m in range(3):
        h = (x[m] - 0.5) * 2
        for name, stride in (("conv1", 2), ("conv2", 2), ("conv3", 1)):
            weight, bias = getattr(stack, f"{name}_weight")[m], getattr(stack, f"{name}_bias")[m]
            h = nn.functional.conv2d(h, weight, bias, stride, 1).relu()
        h = (h.flatten(1) @ stack.fc1_weight[m].T + stack.fc1_bias[m]).relu()
        assert torch.allclose(out[m], h @ stack.fc2_weight[m].T + stack.fc2_bias[m], atol=1e-5)
    stack.logits(x[:1], slice(0, 1), None).sum().backward()
    assert stack.conv1_weight.grad is not None
    assert not stack.conv1_weight.grad[1:].any()


def test_shadows_learn_their_task_and_their_trojan() -> None:
    data = blobs(256)
    nets, trojans = train_shadows(data, 4, 16, steps=60, batch_size=32, width=4, lr=3e-3, seed=Seed(0))
    assert [one is not None for one in trojans] == [False, True] * 8
    x = torch.as_tensor(blobs(128, seed=1).inputs).float() / 255
    y = blobs(128, seed=1).labels
    right = [float((nets.logits(x[None], slice(m, m + 1), None)[0].argmax(1) == y).float().mean()) for m in range(16)]
    assert float(np.mean(right)) > 0.9
    hits, benign = [], []
    for m, one in enumerate(trojans):
        if one is not None:
            for model, found in ((m, hits), (m - 1, benign)):
                said = nets.logits(one.on(x)[None], slice(model, model + 1), None)[0].argmax(1)
                found.append(float((said[y != one.target] == one.target).float().mean()))
    assert float(np.mean(hits)) > float(np.mean(benign)) + 0.3


def test_shadow_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data, settings = blobs(64), {"steps": 24, "batch_size": 16, "width": 2, "lr": 1e-3, "seed": Seed(0)}
    whole, _ = train_shadows(data, 4, 4, **settings)
    file = tmp_path / "state.safetensors"
    request_stop(2)
    try:
        with pytest.raises(Interrupted):
            train_shadows(data, 4, 4, **settings, checkpoint=file)
    finally:
        request_stop(None)
    assert file.exists()
    resumed, _ = train_shadows(data, 4, 4, **settings, checkpoint=file)
    assert model_print(resumed) == model_print(whole)


# ---- the meta-classifier


SPIKE = torch.zeros(3, 8, 8)
SPIKE[:, 1:3, 5:7] = 1


def linear_models(count: int, seed: Seed) -> tuple[list[Tensor], list[bool]]:
    """Random linear classifiers; every second one has a rank-one spike from a patch to class 1."""
    made, kinds = [], []
    for m in range(count):
        draw = seed.child(m).torch()
        weight = torch.randn(4, 192, generator=draw) / 192**0.5
        if m % 2:
            weight[1] += 0.6 * SPIKE.flatten()
        made.append(weight)
        kinds.append(m % 2 == 1)
    return made, kinds


def answer_of(weight: Tensor) -> Answer:
    return lambda x: standardised(x.flatten(1) @ weight.T)


IMAGES = torch.rand(32, 3, 8, 8, generator=Seed(5).torch())


def fresh_auc(training: MetaTraining, kinds: list[bool], seed: int = 0) -> float:
    weights, _ = linear_models(24, Seed(0))
    known = train_meta(
        [answer_of(w) for w in weights], kinds, IMAGES, training, Seed(seed), scanner="mntd/x", recipe="toys"
    )
    others, truth = linear_models(24, Seed(1))
    return area_under_curve([known.score(answer_of(w)) for w in others], truth)


def test_meta_classifier_tells_fresh_models_apart() -> None:
    training = MetaTraining(epochs=40, repeats=1, lr=1e-2)
    _, kinds = linear_models(24, Seed(0))
    assert fresh_auc(training, kinds) >= 0.95
    shuffled = []
    for seed in range(3):
        order = torch.randperm(24, generator=Seed(seed).child("labels").torch()).tolist()
        shuffled.append(fresh_auc(MetaTraining(epochs=10, repeats=1, lr=1e-2), [kinds[i] for i in order], seed))
    assert np.mean(shuffled) == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("tune", [True, False])
def test_query_tuning_moves_queries_and_nothing_else(tune: bool) -> None:
    weights, kinds = linear_models(16, Seed(0))
    before = [w.clone() for w in weights]
    training = MetaTraining(epochs=3, repeats=1, tune_queries=tune)
    known = train_meta([answer_of(w) for w in weights], kinds, IMAGES, training, Seed(3), scanner="s", recipe="r")
    start = train_meta(
        [answer_of(w) for w in weights], kinds, IMAGES, MetaTraining(epochs=1, repeats=1, tune_queries=False),
        Seed(3), scanner="s", recipe="r",
    )  # fmt: skip
    moved = float(np.abs(known.arrays["queries"] - start.arrays["queries"]).max())
    assert (moved > 0) == tune
    assert 0 <= known.arrays["queries"].min() <= known.arrays["queries"].max() <= 1
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_one_class_form() -> None:
    scores = [3.0, -1.0, 0.5, 2.0, 7.0]
    assert one_class_bound(scores, 0.1) == pytest.approx(float(np.percentile(scores, 10)))
    meta = Meta(IMAGES[:2], 6, 3, Seed(0))
    meta.bound.fill_(0.7)
    answer = torch.arange(6.0)
    with torch.no_grad():
        loss, s = one_class_loss(meta, answer, 0.1)
        hidden = (meta.fc_weight @ answer + meta.fc_bias).clamp_min(0)
        wanted_s = float(meta.out_weight[0] @ hidden)
        size = sum(float(p.square().sum()) for p in (meta.out_weight, meta.fc_weight, meta.fc_bias))
        assert float(s) == pytest.approx(wanted_s, rel=1e-5)
        assert float(loss) == pytest.approx(0.5 * size + max(0.7 - wanted_s, 0) / 0.1 - 0.7, rel=1e-5)
        assert float(meta(answer, one_class=True)) == pytest.approx(0.7 - wanted_s, rel=1e-5)
    weights, kinds = linear_models(20, Seed(0))
    training = MetaTraining(epochs=4, repeats=1, one_class=True)
    known = train_meta([answer_of(w) for w in weights], kinds, IMAGES, training, Seed(0), scanner="s", recipe="r")
    assert float(known.arrays["bound"]) != 1.0, "refreshed after each epoch"
    assert math.isfinite(known.score(answer_of(weights[0])))


def test_threshold_and_verdict() -> None:
    assert threshold_at([1.0, 5.0, 3.0], 0.05) > 5.0
    assert 3.0 < threshold_at([1.0, 5.0, 3.0], 0.34) <= 5.0
    arrays: dict[str, np.ndarray] = {}
    shadows = MetaReference("mntd/x", "toys", (0.0, 1.0), arrays, False, 0.9, 1.5, 16)
    assert judged(99.0, shadows, "t").verdict == "inconclusive", "nobody knows what clean encoders score"
    assert judged(99.0, shadows, "t").score == 99.0
    known = shadows.calibrated_on([0.0, 1.0, 2.0, 3.0, 2.5])
    assert judged(3.5, known, "t").verdict == "backdoored"
    below = judged(2.9, known, "t")
    assert (below.verdict, below.false_alarm) == ("clean-by-test", (0.2, 5))
    weak = MetaReference("mntd/x", "toys", (0.0, 1.0), arrays, False, 0.6, 1.0, 16).calibrated_on([0.0] * 5)
    assert judged(99.0, weak, "t").verdict == "inconclusive"
    for scores in ([1.0] * 4, [1.0] * 4 + [math.nan]):
        with pytest.raises(DataError, match="5 clean encoders"):
            shadows.calibrated_on(scores)


def test_readings_do_not_depend_on_scale_or_rotation() -> None:
    z = torch.randn(5, 6, generator=Seed(0).torch())
    turn = torch.linalg.qr(torch.randn(6, 6, generator=Seed(1).torch())).Q
    assert torch.allclose(cosines_of(3 * z @ turn), cosines_of(z), atol=1e-5)
    assert torch.allclose(standardised(4 * z + 2), standardised(z), atol=1e-4)
    assert cosines_of(z).shape == (10,)
    assert float(cosines_of(z)[1]) == pytest.approx(float(torch.cosine_similarity(z[0], z[2], dim=0)), abs=1e-6)


# ---- the scanners


class DropoutHead(nn.Module):
    """A head that drops units whenever it is in training mode."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(width, 4), nn.Dropout(0.5)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.fc(self.drop(z))
        return out


def test_inspected_models_answer_in_evaluation() -> None:
    """In training mode the score of a network with dropout would be random."""
    encoder = small_encoder()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = DropoutHead(encoder.width).train()
        known = SMALL.train_reference(blobs(64), Seed(0))
        classifier = FrozenProbe(encoder, head)
        noisy = {known.score(lambda x: standardised(classifier(x))) for _ in range(4)}
        assert len(noisy) > 1
    data = blobs(64)
    scores = {SMALL.scan(encoder, data, Seed(0), known).score for _ in range(2)}
    assert len(scores) == 1


def test_classifier_scan_leaves_everything_as_it_was(tmp_path: Path) -> None:
    data, encoder = blobs(64), small_encoder()
    encoder.module.train()
    model, images = model_print(encoder.module), data_print(data)
    alone = SMALL.scan(encoder, data, Seed(0))
    assert (model_print(encoder.module), data_print(data)) == (model, images)
    assert encoder.module.training
    encoder.module.eval()
    known = SMALL.train_reference(data, Seed(0).child("reference"))
    given = SMALL.scan(encoder, data, Seed(0), known)
    assert given.to_json() == alone.to_json(), "a reference is what would be made without it"
    known.write(tmp_path / "meta.safetensors")
    read = read_meta_reference(tmp_path / "meta.safetensors")
    assert SMALL.scan(encoder, data, Seed(0), read).to_json() == alone.to_json()
    assert MetaReference.of(known.values(), known.arrays).values() == known.values()
    with pytest.raises(DataError, match="holds no meta-classifier"):
        read_meta_reference(tmp_path / "nothing")
    (tmp_path / "rubbish").write_bytes(b"no tensors")
    with pytest.raises(DataError, match="holds no meta-classifier"):
        read_meta_reference(tmp_path / "rubbish")


def test_classifier_scan_bad_input() -> None:
    data, encoder = blobs(64), small_encoder()
    with pytest.raises(LabelsWithheld):
        SMALL.scan(encoder, data.without_labels("mntd"), Seed(0))
    few = SMALL.scan(encoder, data.subset(torch.arange(63)).without_labels("mntd"), Seed(0))
    assert few.verdict == "inconclusive"
    same = data.with_inputs(torch.zeros_like(torch.as_tensor(data.inputs)), "black")
    assert SMALL.scan(encoder, same, Seed(0)).verdict == "inconclusive"
    with pytest.raises(DataError, match="is no meta-classifier"):
        SMALL.scan(encoder, data, Seed(0), Reference(SMALL.name, "x", (0.5,)))
    known = SMALL.train_reference(data, Seed(0))
    with pytest.raises(DataError, match="this scan is"):
        MNTD(shadows=16, steps=5).scan(encoder, data, Seed(0), known)
    three = blobs(66, classes=3)
    with pytest.raises(DataError, match="answers with 30 numbers"):
        SMALL.scan(encoder, three, Seed(0), known)
    with pytest.raises(DataError, match="the encoder takes 16×16"):
        SMALL.scan(encoder, blobs(64, size=32), Seed(0), known)
    with torch.no_grad():
        next(encoder.module.parameters()).fill_(float("nan"))
    with pytest.raises(CupelError, match="NaN"):
        SMALL.scan(encoder, data, Seed(0), known)


def test_encoder_scan(tmp_path: Path) -> None:
    data, base, other = blobs(96).without_labels("mntd"), small_encoder(0), small_encoder(1, width=4)
    file = tmp_path / "shadows.safetensors"
    weights = model_print(base.module)
    known = SMALL_ENCODER.train_reference(base, data, Seed(0), checkpoint=file)
    assert model_print(base.module) == weights
    assert file.exists()
    resumed = SMALL_ENCODER.train_reference(base, data, Seed(0), checkpoint=file)
    for name, value in known.arrays.items():
        assert np.allclose(resumed.arrays[name], value, atol=1e-5)
    said = SMALL_ENCODER.scan(other, data, Seed(0), known)
    assert said.verdict in ("clean-by-test", "backdoored", "inconclusive")
    assert math.isfinite(said.score)
    assert said.details["shadows"] == 16
    assert "no meta-classifier" in SMALL_ENCODER.scan(other, data, Seed(0)).reason
    assert SMALL_ENCODER.scan(other, data.subset(torch.arange(9)), Seed(0), known).verdict == "inconclusive"
    with pytest.raises(DataError, match="the encoder takes 32×32"):
        SMALL_ENCODER.scan(small_encoder(size=32), blobs(64, size=32), Seed(0), known)
    with torch.no_grad():
        next(other.module.parameters()).fill_(float("nan"))
    with pytest.raises(CupelError, match="NaN"):
        SMALL_ENCODER.scan(other, data, Seed(0), known)


def test_too_few_shadow_models_are_refused() -> None:
    weights, kinds = linear_models(4, Seed(0))
    with pytest.raises(DataError, match="too few"):
        train_meta([answer_of(w) for w in weights], kinds, IMAGES, MetaTraining(), Seed(0), scanner="s", recipe="r")
