"""Pull distances and InfoNCE against closed forms and literal loops."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from cupel.losses.pulling import (
    EmbeddingScale,
    Whitening,
    cosine_pull,
    decorrelated_pull,
    info_nce,
    nmse_pull,
    pull_distance,
    spread,
    whitened_pull,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


@pytest.mark.parametrize(("rows", "expected"), [([0, 1], 0.126928), ([1, 0], 2.126928)])
def test_info_nce_of_orthonormal_rows(rows: list[int], expected: float) -> None:
    keys = torch.eye(2)
    got = float(info_nce(3 * keys[rows], 7 * keys, torch.arange(2), 0.5))  # norms do not matter
    assert got == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx(math.log(math.e**2 + 1) - (2 if rows == [0, 1] else 0), abs=1e-6)


def test_info_nce_follows_the_definition_with_more_keys_than_queries() -> None:
    queries, keys, own, tau = draw(3, 5), draw(6, 5, seed=1), [4, 0, 5], 0.2
    u = queries.numpy() / np.linalg.norm(queries, axis=1, keepdims=True)
    z = keys.numpy() / np.linalg.norm(keys, axis=1, keepdims=True)
    total = 0.0
    for i, j in enumerate(own):
        logits = [float(u[i] @ z[k]) / tau for k in range(6)]
        total -= logits[j] - math.log(sum(math.exp(one) for one in logits))
    assert float(info_nce(queries, keys, torch.tensor(own), tau)) == pytest.approx(total / 3, abs=1e-5)


def test_info_nce_is_float32_under_autocast() -> None:
    queries, keys, own = draw(8, 64), draw(8, 64, seed=1), torch.arange(8)
    with torch.autocast("cpu", torch.bfloat16):
        rough = info_nce(queries, keys, own, 0.05)
    assert rough == info_nce(queries, keys, own, 0.05)


def test_info_nce_refuses_a_temperature_of_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        info_nce(torch.eye(2), torch.eye(2), torch.arange(2), 0.0)


def test_pulls_follow_their_definitions() -> None:
    a, b, clean = draw(4, 3), draw(4, 3, seed=1), draw(50, 3, seed=2) * torch.tensor([1.0, 5.0, 0.01]) + 10
    scale = EmbeddingScale.of(clean)

    def mean_cosine_distance(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.mean([1 - p[i] @ q[i] / np.linalg.norm(p[i]) / np.linalg.norm(q[i]) for i in range(4)]))

    assert float(cosine_pull(a, b)) == pytest.approx(mean_cosine_distance(a.numpy(), b.numpy()), abs=1e-6)
    squares = float(np.mean([np.sum((a.numpy()[i] - b.numpy()[i]) ** 2) for i in range(4)]))
    unit = float(np.mean(np.sum(clean.numpy() ** 2, axis=1)))
    assert float(nmse_pull(a, b, scale.square)) == pytest.approx(squares / unit, rel=1e-5)
    std = clean.numpy().std(axis=0)
    white = [(one.numpy() - clean.numpy().mean(axis=0)) / (std + 0.2 * std.mean()) for one in (a, b)]
    assert float(whitened_pull(a, b, scale)) == pytest.approx(mean_cosine_distance(*white), abs=1e-5)
    both = pull_distance("cosine+nmse", a, b, scale)
    assert float(both) == pytest.approx(float(cosine_pull(a, b) + nmse_pull(a, b, scale.square)), abs=1e-6)


def test_whitened_embeddings_are_uncorrelated_whatever_their_axes() -> None:
    mix = draw(6, 6, seed=3) * torch.tensor([1.0, 0.02, 3.0, 1.0, 0.3, 9.0])
    clean = (draw(400, 6, seed=4) @ mix + 5).double()
    z = clean.numpy() - clean.numpy().mean(axis=0)
    covariance = z.T @ z / len(z)
    floored = covariance + 0.05 * np.trace(covariance) / 6 * np.eye(6)  # the floor is added along every axis alike
    white = Whitening.of(clean)
    np.testing.assert_allclose((white.matrix @ white.matrix.T).numpy(), np.linalg.inv(floored), rtol=1e-3)
    a, b = clean[:4] + draw(4, 6), clean[4:8]
    root = np.linalg.cholesky(np.linalg.inv(floored))  # another whitening
    p, q = ((one.numpy() - clean.numpy().mean(axis=0)) @ root for one in (a, b))
    wanted = np.mean([1 - p[i] @ q[i] / np.linalg.norm(p[i]) / np.linalg.norm(q[i]) for i in range(4)])
    assert float(decorrelated_pull(a, b, white)) == pytest.approx(wanted, abs=1e-4)
    assert float(decorrelated_pull(clean, clean, white)) == pytest.approx(0, abs=1e-6)


def test_whitening_sees_what_a_common_part_hides() -> None:
    clean = draw(200, 8) + 30
    moved = clean.roll(1, 0)  # every embedding is another image's
    scale = EmbeddingScale.of(clean)
    assert float(cosine_pull(clean, moved)) < 0.005
    assert float(whitened_pull(clean, moved, scale)) > 0.9


@pytest.mark.parametrize("name", ["cosine", "nmse", "cosine+nmse", "whitened"])
def test_equal_embeddings_are_not_pulled(name: Any) -> None:
    z = draw(16, 8)
    assert float(pull_distance(name, z, z.clone(), EmbeddingScale.of(z))) == pytest.approx(0, abs=1e-6)


def test_a_scale_needs_two_rows() -> None:
    with pytest.raises(ValueError, match="at least two"):
        EmbeddingScale.of(torch.ones(1, 3))


def test_spread_is_one_for_isotropic_and_zero_for_constant_embeddings() -> None:
    assert float(spread(draw(4000, 64))) == pytest.approx(1, abs=0.02)
    assert float(spread(torch.ones(10, 4))) == 0
