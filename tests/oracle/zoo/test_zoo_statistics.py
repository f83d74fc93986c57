"""Areas, rates and bounds against closed forms, slow transcriptions and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from cupel.zoo.statistics import (
    Confusion,
    auroc,
    auroc_interval,
    lower_bound,
    smallest_found,
    tpr_at_fpr,
    upper_bound,
)

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)


def labelled(high, low):
    return [1] * len(high) + [0] * len(low), [*high, *low]


@given(SCORES, SCORES)
def test_area_is_that_of_scikit_learn_ties_included(high, low):
    assert auroc(high, low) == pytest.approx(roc_auc_score(*labelled(high, low)))


@given(SCORES, SCORES, st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5, 1.0]))
def test_rate_is_the_best_of_the_roc_curve(high, low, fpr):
    false, true, _ = roc_curve(*labelled(high, low), drop_intermediate=False)
    assert tpr_at_fpr(high, low, fpr) == pytest.approx(true[false <= fpr + 1e-12].max())


@given(SCORES, SCORES)
def test_swapping_the_kinds_mirrors_area_and_interval(high, low):
    assert auroc(high, low) == pytest.approx(1 - auroc(low, high))
    left, right = auroc_interval(high, low)
    assert left <= auroc(high, low) <= right
    assert auroc_interval(low, high) == pytest.approx((1 - right, 1 - left), abs=1e-9)


def test_interval_is_a_literal_delong():
    high, low = [3.0, 1.0, 4.0, 1.5, 5.0], [0.5, 2.0, 1.0, 0.0]
    psi = [[1.0 if x > y else 0.5 if x == y else 0.0 for y in low] for x in high]
    area = sum(map(sum, psi)) / 20
    s10 = sum((sum(row) / 4 - area) ** 2 for row in psi) / 4
    s01 = sum((sum(row[j] for row in psi) / 5 - area) ** 2 for j in range(4)) / 3
    half = 1.959963984540054 * math.sqrt(s10 / 5 + s01 / 4) / (area * (1 - area))
    ends = [1 / (1 + math.exp(-(math.log(area / (1 - area)) + sign * half))) for sign in (-1, 1)]
    assert auroc_interval(high, low) == pytest.approx(ends)


@pytest.mark.parametrize(("m", "n"), [(3, 3), (12, 17), (26, 34), (1, 5)])
def test_perfectly_apart_is_no_certainty(m, n):
    low, high = auroc_interval([1.0] * m, [0.0] * n)
    assert high == pytest.approx(1)
    z2 = 1.959963984540054**2  # 1 − θ = z √V(θ) at the lower end
    k = (m + n) / 2 - 1
    variance = low * (1 - low) * (1 + k * ((1 - low) / (2 - low) + low / (1 + low))) / (m * n)
    assert (1 - low) ** 2 == pytest.approx(z2 * variance, rel=1e-6)
    assert auroc_interval([0.0] * m, [1.0] * n) == pytest.approx((0, 1 - low), abs=1e-9)


def test_more_encoders_narrow_it():
    ends = [auroc_interval([1.0] * n, [0.0] * n)[0] for n in (5, 15, 45)]
    assert ends == sorted(ends)


def test_interval_covers_as_often_as_it_says():
    rng, truth, hits = np.random.default_rng(0), 0.8413447, 0  # Φ(1): normal scores √2 apart
    for _ in range(300):
        low, high = auroc_interval((rng.normal(size=28) + math.sqrt(2)).tolist(), rng.normal(size=34).tolist())
        hits += low <= truth <= high
    assert 0.925 <= hits / 300 <= 0.985


def test_bounds_in_closed_form():
    assert upper_bound(0, 30) == pytest.approx(1 - 0.05 ** (1 / 30))
    assert round(upper_bound(0, 30), 3) == 0.095
    assert lower_bound(30, 30) == pytest.approx(0.05 ** (1 / 30))
    assert upper_bound(7, 7) == 1.0
    assert lower_bound(0, 7) == 0.0


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_bounds_leave_five_per_cent_in_the_tail(counts):
    k, n = counts

    def tail(p, ks):
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in ks)

    if k < n:
        assert tail(upper_bound(k, n), range(k + 1)) == pytest.approx(0.05, rel=1e-6)
    if k > 0:
        assert tail(lower_bound(k, n), range(k, n + 1)) == pytest.approx(0.05, rel=1e-6)


def test_confusion_counts():
    assert Confusion.of([True, True, False], [False, True, False, False]) == (2, 1, 1, 3)
    assert Confusion.of([], []) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("areas", "found", "expected"),
    [
        ([], [], None),
        ([0.1], [False], None),
        ([0.02, 0.05], [True, True], (0.02, 2, 2)),
        ([0.02, 0.05, 0.1], [True, False, True], (0.1, 1, 1)),  # a gap ends it, whatever lies below
        ([0.05] * 10 + [0.1], [True] * 9 + [False] + [True], (0.05, 10, 11)),
        ([0.05] * 9 + [0.1], [True] * 8 + [False] + [True], (0.1, 1, 1)),  # 8 of 9 are less than 90 %
    ],
)
def test_smallest_trigger_found(areas, found, expected):
    assert smallest_found(areas, found) == expected


@pytest.mark.parametrize("call", [
    lambda: auroc([], [1.0]), lambda: auroc([1.0], []), lambda: auroc([math.nan], [1.0]),
    lambda: auroc_interval([1.0], [math.inf]), lambda: tpr_at_fpr([], [1.0]), lambda: upper_bound(0, 0),
    lambda: upper_bound(3, 2), lambda: lower_bound(-1, 2),
])  # fmt: skip
def test_nothing_from_nothing(call):
    with pytest.raises(ValueError, match=r"scores|finite|share"):
        call()
