"""Robust masking and its certificate: against loops, against every attack on small maps, and on ties."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cupel.certify.masking import CERTIFIED, CORRECT, WRONG, masked_prediction, masked_scores, outcomes, votes_certified
from cupel.certify.windows import Windows, bands, receptive_field, squares, window_size
from cupel.errors import SettingsError


def maps(n: int, side: int, classes: int, seed: int = 0, boost: tuple[float, float] = (1, 3)) -> tuple[Tensor, Tensor]:
    """Exponential evidence with a random boost of the true class, `[n, cells, classes]` in float64, and labels."""
    g = np.random.default_rng(seed)
    e, y = g.exponential(size=(n, side * side, classes)), g.integers(0, classes, n)
    e[np.arange(n), :, y] *= g.uniform(*boost, size=(n, 1))
    return torch.from_numpy(e), torch.from_numpy(y)


def places(side: int, w: int) -> list[list[int]]:
    """Cells of each window, by hand."""
    return [[(top + i) * side + left + j for i in range(w) for j in range(w)]
            for top in range(side - w + 1) for left in range(side - w + 1)]  # fmt: skip


def slow_prediction(e: Tensor, windows: list[list[int]], threshold: float) -> int:
    """Algorithm 1 in loops; e is `[cells, classes]`."""
    scores = []
    for k in range(e.shape[1]):
        evidence = [max(0.0, float(v)) for v in e[:, k]]
        total = math.fsum(evidence)
        strongest = max(math.fsum(evidence[c] for c in window) for window in windows)
        share = strongest / total if total > 0 else 0.0
        scores.append(total - strongest if share > threshold else total)
    return max(range(len(scores)), key=lambda k: (scores[k], k))


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_prediction_is_that_of_a_loop(threshold: float) -> None:
    e, _ = maps(60, 4, 3)
    e = e - 0.3  # some evidence is negative
    found = masked_prediction(e, squares(4, 4, 2), threshold)
    assert found.tolist() == [slow_prediction(one, places(4, 2), threshold) for one in e]


def attacked(e: Tensor, y: int, windows: list[list[int]], g: np.random.Generator, draws: int) -> list[Tensor]:
    """For each window: the true class emptied and one wrong class filled, and random contents."""
    made = []
    for window in windows:
        for k in range(e.shape[1]):
            if k != y:
                one = e.clone()
                one[window, y], one[window, k] = 0.0, 1e6
                made.append(one)
        for _ in range(draws):
            one = e.clone()
            scale = 10.0 ** g.uniform(-2, 2)
            one[window] = torch.from_numpy(g.exponential(scale, size=(len(window), e.shape[1])))
            made.append(one)
    return made


def test_a_certificate_is_never_broken_and_what_has_none_always_is() -> None:
    e, y = maps(400, 5, 3)
    windows = squares(5, 5, 2)
    found = outcomes(e, y, windows)
    assert {int((found == k).sum()) > 15 for k in (WRONG, CORRECT, CERTIFIED)} == {True}
    g = np.random.default_rng(1)
    for i in range(400):
        if found[i] == WRONG:
            assert slow_prediction(e[i], places(5, 2), 0.0) != y[i]
            continue
        worst = torch.stack(attacked(e[i], int(y[i]), places(5, 2), g, draws=20))
        broken = bool((masked_prediction(worst, windows) != y[i]).any())
        assert broken == (found[i] == CORRECT), i


def test_exhaustive_attack_on_a_small_map() -> None:
    """Every content from a grid of values in every window: 3×3 cells, one-cell windows, two classes."""
    e, y = maps(40, 3, 2, seed=3)
    e = (e * 2).round()  # ties happen
    windows = squares(3, 3, 1)
    found = outcomes(e, y, windows)
    values = [0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 1e4]
    for i in range(40):
        if found[i] == WRONG:
            continue
        tried = []
        for cell, a, b in itertools.product(range(9), values, values):
            one = e[i].clone()
            one[cell] = torch.tensor([a, b], dtype=torch.float64)
            tried.append(one)
        broken = bool((masked_prediction(torch.stack(tried), windows) != y[i]).any())
        assert broken == (found[i] == CORRECT), i


@pytest.mark.parametrize("threshold", [0.1, 0.25, 0.5])
def test_a_certificate_with_a_threshold_is_never_broken(threshold: float) -> None:
    e, y = maps(120, 4, 3, seed=5, boost=(1, 12))
    windows = squares(4, 4, 2)
    found = outcomes(e, y, windows, threshold)
    assert int((found == CERTIFIED).sum()) >= 5
    g = np.random.default_rng(2)
    for i in (found == CERTIFIED).nonzero().flatten().tolist():
        worst = attacked(e[i], int(y[i]), places(4, 2), g, draws=40)
        for window in places(4, 2):  # as much as passes unmasked, in each wrong class
            for k in range(3):
                outside = float(e[i, :, k].sum() - e[i, window, k].sum())
                one = e[i].clone()
                one[window, int(y[i])] = 0
                one[window, k] = 0.999 * threshold * outside / (1 - threshold) / len(window)
                if k != y[i]:
                    worst.append(one)
        assert bool((masked_prediction(torch.stack(worst), windows, threshold) == y[i]).all()), i


def test_a_ring_of_bands_is_certified_around_its_end() -> None:
    g = np.random.default_rng(4)
    e = torch.from_numpy(g.dirichlet([1, 1, 1], size=(100, 10)))
    y = torch.from_numpy(g.integers(0, 3, 100))
    e[torch.arange(100), :, y] += torch.from_numpy(g.uniform(0, 3, size=(100, 1)))
    windows = bands(10, 3)
    by_hand = [[(start + i) % 10 for i in range(3)] for start in range(10)]
    found = outcomes(e, y, windows)
    assert masked_prediction(e, windows).tolist() == [slow_prediction(one, by_hand, 0.0) for one in e]
    for i in range(100):
        if found[i] != WRONG:
            worst = torch.stack(attacked(e[i], int(y[i]), by_hand, g, draws=5))
            assert bool((masked_prediction(worst, windows) != y[i]).any()) == (found[i] == CORRECT), i


def test_larger_windows_certify_less() -> None:
    e, y = maps(600, 6, 3, seed=6)
    share = [float((outcomes(e, y, squares(6, 6, w)) == CERTIFIED).float().mean()) for w in (1, 2, 3, 4, 5)]
    assert share == sorted(share, reverse=True)
    assert share[0] > 0.6
    assert share[4] < 0.2


def test_windows() -> None:
    assert [window_size(p, r, 8) for p, r in ((30, 17), (32, 17), (32, 33), (32, 9), (60, 17))] == [6, 6, 8, 5, 10]
    assert squares(4, 5, 2).covers.long().sum(dim=1).tolist() == [4] * 12
    assert {frozenset(row.nonzero().flatten().tolist()) for row in squares(5, 5, 3).covers} == set(
        map(frozenset, places(5, 3))
    )
    assert receptive_field((3, 3, 3, 1), (1, 2, 2, 1)) == (9, 4)
    for make in (lambda: squares(4, 6, 4), lambda: squares(6, 4, 5), lambda: bands(8, 8)):
        with pytest.raises(SettingsError, match="nothing"):
            make()


def test_negative_evidence_counts_as_none() -> None:
    e, y = maps(30, 4, 3)
    e[:, ::5] = 0
    worse = e.where(e > 0, -7.0)
    windows = squares(4, 4, 2)
    assert torch.equal(masked_scores(worse, windows), masked_scores(e, windows))
    assert torch.equal(outcomes(worse, y, windows), outcomes(e, y, windows))


def test_ties_go_to_the_highest_class_in_prediction_and_certificate() -> None:
    windows = squares(3, 3, 1)
    e = torch.zeros(1, 9, 3)
    e[0, :, 1], e[0, :, 2] = 1.0, 1.0
    assert masked_prediction(e, windows).tolist() == [2]
    assert outcomes(e, torch.tensor([1]), windows).tolist() == [WRONG]
    # least of the label: 9 − 1 − 1 = 7; most of the other: 7 outside of any window
    level = Windows(windows.covers, windows.shape, 1)
    e = torch.zeros(2, 9, 3, dtype=torch.float64)
    e[:, :, 1] = 1.0
    e[0, 0, 2], e[1, 0, 0] = 7.0, 7.0
    assert outcomes(e, torch.tensor([1, 1]), level).tolist() == [CORRECT, CERTIFIED]


def test_no_evidence_at_all() -> None:
    e = torch.zeros(2, 9, 3)
    assert masked_prediction(e, squares(3, 3, 2)).tolist() == [2, 2]
    assert outcomes(e, torch.tensor([0, 1]), squares(3, 3, 2)).tolist() == [WRONG, WRONG]
    assert masked_prediction(e, squares(3, 3, 2), 0.5).tolist() == [2, 2]


def test_votes() -> None:
    votes = torch.tensor([[20, 4], [21, 4], [4, 20], [4, 21], [5, 20]])
    assert votes_certified(votes, torch.tensor([0, 0, 1, 1, 1]), 8).tolist() == [False, True, True, True, False]
