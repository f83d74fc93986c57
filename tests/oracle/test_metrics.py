"""Metrics against eight samples counted by hand, and against double loops."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch

import cupel.metrics
from cupel.errors import DataError, UsageError
from cupel.metrics import (
    History,
    accuracy,
    attack_success_rate,
    attack_success_rate_all,
    check_labels,
    check_target,
    concentration,
    feature_std,
    mean_cosine,
    mode_share,
    poisoned_accuracy,
    predicted_class,
    robust_accuracy,
    tail,
)
from cupel.records import Metric
from cupel.types import Dataset

#          sample   0  1  2  3  4  5  6  7
TRUE = torch.tensor([0, 0, 1, 1, 2, 2, 2, 1])
CLEAN = torch.tensor([0, 1, 1, 1, 2, 0, 2, 2])  # right: 0, 2, 3, 4, 6
STAMPED = torch.tensor([1, 0, 1, 2, 1, 1, 2, 1])  # class 1: 0, 2, 4, 5, 7; right: 1, 2, 6, 7


def labelled(labels: list[int], classes: tuple[str, ...] = ()) -> Dataset:
    images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    return Dataset(images, torch.tensor(labels), torch.arange(len(labels)), "signs", classes)


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(cupel.metrics).failed == 0


def test_eight_samples_by_hand():
    assert accuracy(CLEAN, TRUE) == (5, 8)
    # the target class 1 owns samples 2, 3, 7; of 0, 1, 4, 5, 6 the trigger turned 0, 4, 5
    assert attack_success_rate(STAMPED, TRUE, 1) == (3, 5)
    assert attack_success_rate_all(STAMPED, TRUE, 1) == (5, 8)
    assert robust_accuracy(STAMPED, TRUE, 1) == (2, 5)  # samples 1 and 6
    assert poisoned_accuracy(STAMPED, TRUE) == (4, 8)
    assert mode_share(STAMPED) == (5, 8)


@pytest.mark.parametrize(
    ("target", "rate", "everything", "robust"), [(0, (0, 6), (1, 8), (3, 6)), (2, (1, 5), (2, 8), (3, 5))]
)
def test_other_targets_by_hand(target, rate, everything, robust):
    assert attack_success_rate(STAMPED, TRUE, target) == rate
    assert attack_success_rate_all(STAMPED, TRUE, target) == everything
    assert robust_accuracy(STAMPED, TRUE, target) == robust


def test_success_and_robustness_share_their_denominator_and_exclude_each_other():
    draw = torch.Generator().manual_seed(3)
    for _ in range(50):
        predicted, labels = torch.randint(4, (2, 37), generator=draw)
        hit, n = attack_success_rate(predicted, labels, 2)
        right, m = robust_accuracy(predicted, labels, 2)
        assert n == m == int((labels != 2).sum())
        assert hit + right <= n
        pairs = list(zip(predicted.tolist(), labels.tolist(), strict=True))
        assert hit == sum(p == 2 for p, y in pairs if y != 2)
        assert right == sum(p == y for p, y in pairs if y != 2)


def test_nothing_left_to_measure_on_is_no_value():
    only_target = torch.tensor([1, 1])
    count = attack_success_rate(only_target, only_target, 1)
    assert count == (0, 0)
    assert robust_accuracy(only_target, only_target, 1) == (0, 0)
    assert attack_success_rate_all(only_target, only_target, 1) == (2, 2)
    assert Metric.of([count]).value is None
    nothing = torch.empty(0, dtype=torch.int64)
    assert accuracy(nothing, nothing) == mode_share(nothing) == (0, 0)


def test_ties_go_to_the_smallest_class():
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [3.0, 3.0, 3.0], [-torch.inf, -1.0, -1.0]])
    assert predicted_class(logits).tolist() == [0, 1, 0, 1]
    assert predicted_class(logits.flip(0).repeat(400, 40)).tolist() == [1, 0, 1, 0] * 400


def test_logits_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match="not numbers"):
        predicted_class(torch.tensor([[0.0, torch.nan]]))


def test_wrong_shapes_and_unlabelled_test_data_are_refused():
    with pytest.raises(ValueError, match="predictions for"):
        accuracy(torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match="1 of 2 images have no label"):
        accuracy(torch.tensor([0, 0]), torch.tensor([0, -1]))


def test_concentration_equals_the_double_loop():
    x = torch.randn(17, 5, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    total = 0.0
    for i in range(17):
        for j in range(17):
            if i != j and i != 3 and j != 3:
                a, b = x[i].double().numpy(), x[j].double().numpy()
                total += float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    assert concentration(x) == pytest.approx(total / (17 * 16), abs=1e-12)


def test_concentration_of_known_sets():
    assert concentration(torch.tensor([[1.0, 2.0]]).repeat(50, 1) * torch.rand(50, 1).add(0.1)) == pytest.approx(1)
    assert concentration(torch.eye(6)) == pytest.approx(0)
    assert concentration(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-1)
    with pytest.raises(ValueError, match="two rows"):
        concentration(torch.ones(1, 3))


def test_feature_std_is_one_on_the_sphere_and_zero_when_collapsed():
    sphere = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(1))
    assert feature_std(sphere) == pytest.approx(1, abs=0.01)
    assert feature_std(torch.ones(100, 32) * torch.rand(100, 1).add(0.1)) == pytest.approx(0, abs=1e-6)
    assert feature_std(torch.zeros(5, 4)) == 0
    x = sphere[:9]
    u = (x / x.norm(dim=1, keepdim=True)).double().numpy()
    assert feature_std(x) == pytest.approx(float(u.std(axis=0).mean() * 32**0.5), rel=1e-6)


def test_mean_cosine_by_rows_and_with_one_reference():
    a, b = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(2)).double()
    loop = [float(p @ q / (p.norm() * q.norm())) for p, q in zip(a, b, strict=True)]
    assert mean_cosine(a.float(), b.float()) == pytest.approx(np.mean(loop), abs=1e-6)
    to_one = [float(p @ b[0] / (p.norm() * b[0].norm())) for p in a]
    assert mean_cosine(a, b[:1]) == pytest.approx(np.mean(to_one), abs=1e-12)
    with pytest.raises(ValueError, match="no cosine"):
        mean_cosine(a, b[:2])


def test_target_class_out_of_range_names_data_and_range():
    data = labelled([0, 1], classes=("stop", "yield", "priority"))
    check_target(2, data)
    for wrong in (-1, 3):
        with pytest.raises(UsageError, match=f"signs: target class {wrong} is not one of its 3 classes.*0 to 2"):
            check_target(wrong, data)
    check_target(1, labelled([0, 1]))
    with pytest.raises(UsageError, match="2 classes"):
        check_target(2, labelled([0, 1]))


def test_labels_that_cannot_be_learned_are_one_line():
    check_labels(torch.tensor([0, 2]), 3, "train")
    with pytest.raises(DataError, match="train: holds no images"):
        check_labels(torch.empty(0, dtype=torch.int64), 3, "train")
    with pytest.raises(DataError, match="1 of 2 images have no label"):
        check_labels(torch.tensor([-1, 2]), 3, "train")
    with pytest.raises(UsageError, match="class index 3 is outside the 3 classes"):
        check_labels(torch.tensor([0, 3]), 3, "train")
    with pytest.raises(UsageError, match="class index -2"):
        check_labels(torch.tensor([0, -2]), 3, "train")


def test_tail_over_the_last_tenth():
    history = [(0, 10)] * 25 + [(10, 10), (4, 10), (6, 10), (8, 10), (5, 10)]  # 30 epochs: the tail is 3
    result = tail(history)
    assert result == {"last": 0.5, "mean": pytest.approx(19 / 30), "min": 0.5, "max": 0.8, "lowest": 0, "highest": 1}
    assert tail([(3, 4)])["mean"] == 0.75
    assert tail([(0, 4), (4, 4)], share=1)["mean"] == 0.5
    assert tail([(0, 0)]) == dict.fromkeys(("last", "mean", "min", "max", "lowest", "highest"))
    with pytest.raises(ValueError, match="epoch"):
        tail([])


def test_history_keeps_every_epoch():
    counts = iter([1, 2, 3])
    history = History(lambda head: {"asr": (next(counts), 4)})
    for _ in range(3):
        history(torch.nn.Identity())
    assert history.counts == {"asr": [(1, 4), (2, 4), (3, 4)]}
    assert history.tail("asr")["last"] == 0.75
