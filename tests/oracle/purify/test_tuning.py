"""FT, LP, FE-tuning, FT-init, FST: the head, the shift term and the projection."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.inference import FrozenProbe, classify, features
from cupel.protocols import Batch
from cupel.purify.labelled import linear_head
from cupel.purify.tuning import FST, FT, LP, FETuning, FTInit, TuningLearner, feature_shift, project_norm, redraw
from cupel.seeds import Seed
from cupel.types import Dataset
from fingerprints import same_state
from toys import blobs, small_encoder

DATA = blobs(48)
PLAIN: dict[str, Any] = {"steps": 4, "batch_size": 16, "augment": None}


def classifier() -> FrozenProbe:
    encoder = small_encoder(width=4)
    return FrozenProbe(encoder, linear_head(encoder, DATA, 5e-4))


def linear(model: FrozenProbe) -> nn.Linear:
    assert isinstance(model.head, nn.Linear)
    return model.head


def test_the_length_of_the_head_is_kept_after_every_step() -> None:
    model = classifier()
    learner = TuningLearner(FST(**PLAIN), model, DATA.labels, Seed(0))
    norm = float(learner.norm)
    optimizer = torch.optim.SGD(learner.parameters(), 0.05, momentum=0.9)
    for step in range(6):
        rows = torch.arange(16) + 4 * step
        loss, _ = learner.loss(Batch(DATA.inputs[rows], rows, Seed(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.after_step()
        assert abs(float(linear(model).weight.detach().norm()) - norm) / norm < 1e-5


@pytest.mark.parametrize("head_square", [None, 2.0])
def test_one_step_of_fst_against_a_literal_one(head_square: float | None) -> None:
    """Equation 3 in NumPy, for the head: the embeddings are those before the step."""
    model, given, lr, rows = classifier(), 0.3, 0.05, torch.arange(48)
    original = linear(model).weight.detach().double().numpy()
    alpha = given if head_square is None else given * head_square / (original**2).sum()
    settings = FST(
        steps=1, batch_size=48, augment=None, batch_norm="frozen", alpha=given, head_square=head_square, lr=lr
    )
    fresh = classifier()
    redraw(linear(fresh), Seed(5).child("head"))
    W, b = (p.detach().double().numpy() for p in (linear(fresh).weight, linear(fresh).bias))
    h = features(model.encoder, DATA, dtype=torch.float32).double().numpy()
    logits = h @ W.T + b
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[rows.numpy(), DATA.labels.numpy()] -= 1
    W1 = W - lr * (p.T @ h / 48 + alpha * original)
    b1 = b - lr * p.mean(0)
    W1 *= np.linalg.norm(original) / np.linalg.norm(W1)
    made, history = settings.purify_classifier(model, DATA, Seed(5))
    np.testing.assert_allclose(linear(made).weight.detach().numpy(), W1, atol=2e-6)
    np.testing.assert_allclose(linear(made).bias.detach().numpy(), b1, atol=2e-6)
    assert history["shift"][0] == pytest.approx(alpha * (W * original).sum(), rel=1e-5)
    assert history["loss"][0] == pytest.approx(history["cross_entropy"][0] + history["shift"][0], rel=1e-5)


def test_without_term_and_projection_fst_is_ft_init() -> None:
    bare, _ = FST(**PLAIN, alpha=0.0, project=False).purify_classifier(classifier(), DATA, Seed(1))
    init, _ = FTInit(**PLAIN).purify_classifier(classifier(), DATA, Seed(1))
    fst, _ = FST(**PLAIN).purify_classifier(classifier(), DATA, Seed(1))
    assert same_state(bare.encoder.module, init.encoder.module)
    assert same_state(bare.head, init.head)
    assert not same_state(fst.head, init.head)


def test_the_gradient_of_the_term_is_the_original_head() -> None:
    draw = Seed(0).torch()
    W, original = (torch.randn(3, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    alpha, eps = 0.2, 1e-6
    for i in range(3):
        for j in range(5):
            up, down = W.clone(), W.clone()
            up[i, j] += eps
            down[i, j] -= eps
            slope = alpha * (feature_shift(up, original) - feature_shift(down, original)) / (2 * eps)
            assert float(slope) == pytest.approx(alpha * float(original[i, j]), abs=1e-4)


def test_the_term_alone_turns_the_head_round() -> None:
    draw = Seed(1).torch()
    W, original = (torch.randn(10, 32, generator=draw) for _ in range(2))
    W, norm = nn.Parameter(W), original.norm()
    project_norm(W.data, norm)
    optimizer = torch.optim.SGD([W], 0.01, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        (0.2 * feature_shift(W, original)).backward()
        optimizer.step()
        project_norm(W, norm)
    value = float(0.2 * feature_shift(W.detach(), original))
    assert float(torch.cosine_similarity(W.detach().flatten(), original.flatten(), dim=0)) < -0.99
    assert value == pytest.approx(-0.2 * float(norm) ** 2, rel=0.01)


def test_lp_leaves_the_encoder_and_fe_tuning_its_new_head() -> None:
    model = classifier()
    probed, _ = LP(**PLAIN).purify_classifier(model, DATA, Seed(0))
    assert same_state(probed.encoder.module, model.encoder.module)  # parameters and buffers
    assert not same_state(probed.head, model.head)
    moved, _ = LP(**PLAIN, batch_norm="train").purify_classifier(model, DATA, Seed(0))
    assert not same_state(moved.encoder.module, model.encoder.module)
    drawn = classifier()
    redraw(linear(drawn), Seed(0).child("head"))
    tuned, _ = FETuning(**PLAIN).purify_classifier(model, DATA, Seed(0))
    assert same_state(tuned.head, drawn.head)
    assert not same_state(tuned.encoder.module, model.encoder.module)


def test_ft_goes_on_from_the_head_it_was_given() -> None:
    small, _ = FT(**{**PLAIN, "steps": 1}, lr=1e-6).purify_classifier(classifier(), DATA, Seed(0))
    torch.testing.assert_close(linear(small).weight, linear(classifier()).weight, atol=1e-4, rtol=0)
    scaled, _ = FT(**PLAIN, project=True).purify_classifier(classifier(), DATA, Seed(0))
    norm = float(linear(classifier()).weight.detach().norm())
    assert float(linear(scaled).weight.detach().norm()) == pytest.approx(norm, rel=1e-5)


def test_new_weights_are_uniform() -> None:
    head = nn.Linear(512, 20)
    redraw(head, Seed(3))
    bound = 512**-0.5
    assert float(head.weight.detach().abs().max()) <= bound
    assert float(head.bias.detach().abs().max()) <= bound
    assert float(head.weight.detach().std()) == pytest.approx(1 / (3 * 512) ** 0.5, rel=0.05)


@dataclass(frozen=True, eq=False)
class _Spiked:
    """An encoder of three numbers, which are the channels of one pixel."""

    module: nn.Module
    width: int = 16
    input_size: int = 1

    def __call__(self, x: Tensor, /) -> Tensor:
        out: Tensor = self.module(x)
        return out


def _toy(seed: int) -> tuple[FrozenProbe, Dataset, Tensor]:
    """Two Gaussians in two channels; of the training images 1 % of class 0 bear a spike in the third and label 1.

    Returns:
        The poisoned classifier, 100 clean images, and images of class 0 with the spike.
    """
    root = Seed(seed)
    draw = root.child("data").torch()

    def points(n: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % 2
        xy = torch.randn(n, 2, generator=draw) * 0.08 + torch.tensor([0.35, 0.65])[y][:, None]
        x = torch.cat([xy, torch.zeros(n, 1)], dim=1).clamp(0, 1)
        return (x * 255).round().to(torch.uint8).view(n, 3, 1, 1), y

    raw, y = points(2000)
    planted = (y == 0).nonzero().flatten()[:10]
    raw[planted, 2] = 255
    y[planted] = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(root.child("net").value)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        head = nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], 0.01)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(net(raw.float() / 255)), y).backward()
        optimizer.step()
    clean, labels = points(100)
    hit, _ = points(400)
    hit = hit[::2].clone()
    hit[:, 2] = 255
    data = Dataset(clean, labels, torch.arange(100), "toy", ("a", "b"))
    return FrozenProbe(_Spiked(net.eval()), head.eval()), data, hit


@pytest.mark.full
def test_fst_lowers_the_attack_at_least_as_much_as_ft_on_a_toy() -> None:
    better, starts = 0, []
    for seed in range(10):
        model, clean, hit = _toy(seed)

        def rate(made: FrozenProbe, hit: Tensor = hit) -> float:
            return float((classify(made.head, features(made.encoder, hit, store=False)) == 1).float().mean())

        starts.append(rate(model))
        plain: dict[str, Any] = {"epochs": 20, "batch_size": 20, "augment": None, "lr": 0.05}
        ft, fst = (rate(cls(**plain).purify_classifier(model, clean, Seed(seed))[0]) for cls in (FT, FST))
        better += fst <= ft
    assert np.mean(starts) > 0.9
    assert better >= 8
