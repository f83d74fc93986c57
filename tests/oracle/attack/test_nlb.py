"""NLB: scores against the dense matrix and known clusters, the choice of rows, the checkerboard, bad input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from cupel.attack.nlb import NLB
from cupel.errors import DataError, LabelsWithheld, UsageError
from cupel.inference import features
from cupel.seeds import Seed
from cupel.selection import contrastive_scores, majority, neighbours, smallest_sufficient_cluster
from cupel.triggers import Patch
from cupel.triggers.checker import Checker
from cupel.types import Goal, Knowledge
from toys import blobs, small_encoder, trained_encoder

M = 8
SIZES = torch.tensor([M // 2, M, 2 * M, 4 * M])
CLUSTERS = torch.eye(4).repeat_interleave(SIZES, dim=0)
OF = torch.arange(4).repeat_interleave(SIZES)


def cloud(n: int = 2000, dim: int = 24, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def dense(unit: torch.Tensor, m: int, positive: bool, negative: bool) -> np.ndarray:
    """The formula, row by row, in NumPy."""
    scores = []
    similarity = unit.double().numpy() @ unit.double().numpy().T
    for row in similarity:
        ordered = np.sort(row)[::-1]
        first = ordered[:m].sum() if positive else 0.0
        scores.append(first - (ordered[m : 2 * m].sum() if negative else 0.0))
    return np.array(scores)


def test_known_scores_of_orthogonal_clusters():
    scores = contrastive_scores(CLUSTERS, M)
    expected = torch.tensor([M / 2, M, 0.0, 0.0])[OF]
    torch.testing.assert_close(scores, expected)
    rows = neighbours(CLUSTERS, int(scores.argmax()), M)
    assert OF[rows].unique().tolist() == [1]
    positive = contrastive_scores(CLUSTERS, M, negative=False)
    torch.testing.assert_close(positive, torch.tensor([M / 2, M, M, M])[OF].float())
    assert int(positive.argmax()) == int((OF == 1).nonzero()[0])  # of equal scores the first row


@pytest.mark.parametrize(("positive", "negative"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("block", [128, 1024])
def test_blocks_equal_the_dense_matrix(positive, negative, block):
    unit = cloud()
    ours = contrastive_scores(unit, 60, positive=positive, negative=negative, block=block)
    np.testing.assert_allclose(ours.numpy(), dense(unit, 60, positive, negative), atol=2e-4)


def test_when_two_neighbourhoods_do_not_fit_the_second_is_what_is_left():
    unit = cloud(20)
    np.testing.assert_allclose(contrastive_scores(unit, 15).numpy(), dense(unit, 15, True, True), atol=1e-5)


def test_scores_do_not_change_when_the_space_is_turned():
    unit = cloud(500)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1))).Q
    torch.testing.assert_close(contrastive_scores(unit @ turn, 20), contrastive_scores(unit, 20), atol=1e-4, rtol=0)


def test_neighbours_equal_a_sort_and_hold_the_anchor_among_its_copies():
    unit = cloud(300)
    similarity = (unit @ unit[7]).numpy()
    assert neighbours(unit, 7, 25).tolist() == sorted(np.argsort(-similarity, kind="stable")[:25].tolist())
    copies = torch.ones(9, 3) / 3**0.5
    assert 8 in neighbours(copies, 8, 3).tolist()


def test_kmeans_takes_the_smallest_cluster_that_is_large_enough():
    rows = smallest_sufficient_cluster(CLUSTERS, M, 4, Seed(0), "toy")
    assert rows.tolist() == (OF == 1).nonzero().flatten().tolist()
    with pytest.raises(DataError, match=r"the largest of 4 clusters has 32 images, 33 are to be poisoned"):
        smallest_sufficient_cluster(CLUSTERS, 4 * M + 1, 4, Seed(0), "toy")


def test_majority():
    labels = torch.tensor([2, 2, 0, 1, 1])
    assert majority(labels, torch.tensor([0, 1, 2])) == (2, 2 / 3)
    assert majority(labels, torch.tensor([0, 3])) == (1, 0.5)


DATA = blobs(200)
GOAL = Goal(None, None, "blobs", 1)


def attack(selection="contrastive", rate=0.3, **more) -> NLB:
    return NLB(selection=selection, poison_rate_in_class=rate, num_classes=4, **more)


def knowing(encoder=None, **goal) -> Knowledge:
    return Knowledge((dataclasses.replace(GOAL, **goal),), surrogate=encoder)


@pytest.mark.parametrize("selection", ["contrastive", "contrastive_pos", "contrastive_neg", "kmeans", "random"])
def test_the_budget_is_kept_and_no_label_is_read(selection):
    method = attack(selection, num_clusters=4)
    assert "labels" not in method.needs
    made = method.poison(DATA.without_labels("nlb"), knowing(small_encoder()), Seed(0))
    m = int(0.3 * 200 / 4)
    assert len(made.rows) == m == len(made.rows.unique())
    assert made.rows.tolist() == sorted(made.rows.tolist())
    changed = (made.data.inputs != DATA.inputs).flatten(1).any(1).nonzero().flatten()
    assert set(changed.tolist()) <= set(made.rows.tolist())
    trigger = Checker()
    assert torch.equal(made.data.inputs[made.rows], trigger(DATA.inputs[made.rows], made.rows.tolist(), Seed(0)))
    assert made.goals[0].target_class is None
    assert made.goals[0].trigger == trigger
    again = method.poison(DATA.without_labels("nlb"), knowing(small_encoder()), Seed(0))
    assert torch.equal(again.rows, made.rows)


def test_the_chosen_set_is_the_one_of_the_formula():
    encoder = small_encoder()
    made = attack().poison(DATA, knowing(encoder), Seed(0))
    unit = normalize(features(encoder, DATA), dim=1)
    anchor = int(np.argmax(dense(unit, 15, True, True)))
    assert anchor in made.rows.tolist()
    assert made.rows.tolist() == neighbours(unit, anchor, 15).tolist()


def test_oracle_takes_one_class_and_needs_labels():
    method = attack("oracle", 0.5)
    assert method.needs == {"labels"}
    made = method.poison(DATA, knowing(), Seed(0))
    assert majority(DATA.labels, made.rows) == (1, 1.0)
    with pytest.raises(LabelsWithheld):
        method.poison(DATA.without_labels("nlb"), knowing(), Seed(0))


def test_a_random_set_is_as_mixed_as_the_data():
    big = blobs(2000)
    shares = [majority(big.labels, attack("random", 0.4).poison(big, knowing(), Seed(s)).rows)[1] for s in range(5)]
    sigma = (0.25 * 0.75 / 200) ** 0.5
    assert 0.25 <= np.mean(shares) < 0.25 + 3 * sigma


def test_add_keeps_the_clean_images():
    made = attack(poison_mode="add").poison(DATA, knowing(small_encoder()), Seed(0))
    assert len(made.data) == 215
    assert torch.equal(made.data.inputs[:200], DATA.inputs)
    assert made.rows.tolist() == list(range(200, 215))


def test_published_budgets():
    assert int(NLB().poison_rate_in_class * 45_000 / NLB().num_classes) == 2700
    assert int(0.6 * 130_000 / 100) == 780  # 0.6 % of the images


@pytest.mark.parametrize(
    ("method", "knowledge", "says"),
    [
        (attack(rate=0.0), knowing(small_encoder()), "selects 0 of 200 images"),
        (NLB(poison_rate_in_class=1.0, num_classes=1), knowing(small_encoder()), "selects 200 of 200 images"),
        (attack(), knowing(), "no encoder to choose by"),
        (attack("kmeans", 0.9, num_clusters=60), knowing(small_encoder()), "are to be poisoned"),
        (attack("oracle", 1.0), knowing(target_class=9), "no image of target class 9"),
        (NLB(selection="oracle", poison_rate_in_class=0.9, num_classes=2), knowing(), "has 50 images of the target"),
    ],
)
def test_bad_input_is_one_line(method, knowledge, says):
    with pytest.raises(DataError, match=says):
        method.poison(DATA, knowledge, Seed(0))


def test_collapsed_surrogates_and_several_goals():
    encoder = small_encoder()
    with torch.no_grad():
        for p in encoder.module.parameters():
            p.zero_()
    with pytest.raises(DataError, match="all coincide"):
        attack().poison(DATA, knowing(encoder), Seed(0))
    with pytest.raises(UsageError, match="takes one goal, got 2"):
        attack("random").poison(DATA, Knowledge((GOAL, GOAL)), Seed(0))


def test_checkerboard_of_nine_pixels_at_the_centre():
    x = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
    made = Checker()(x, [0, 1], Seed(0))
    where = (made != x).any(1)[0].nonzero()
    assert where.min(0).values.tolist() == [14, 14]
    assert where.max(0).values.tolist() == [16, 16]
    assert len(where) == 9
    assert int((made[0] == 255).all(0).sum()) == 4
    faint = Checker(opacity=0.2)(x, [0, 1], Seed(0))
    assert sorted(faint[0, 0].unique().tolist()) == [80, 100, 131]


@pytest.mark.parametrize(("place", "pixels"), [("corner", 9), ("corners", 36), ("full", 32 * 32)])
def test_other_places(place, pixels):
    mask, pattern = Checker(place=place)._stamp(32, 32)
    assert int(mask[0].sum()) == pixels
    assert pattern.shape == (3, 32, 32)


def test_goals_trigger_comes_first_and_small_images_are_refused():
    made = attack("random").poison(DATA, knowing(trigger=Patch(size=3)), Seed(0))
    assert made.goals[0].trigger == Patch(size=3)
    with pytest.raises(UsageError, match="does not fit"):
        Checker(cell=8)(DATA.inputs, DATA.ids.tolist(), Seed(0))


@pytest.mark.slow
def test_selected_sets_are_of_one_class_where_the_encoder_knows_the_classes():
    data = blobs(800, seed=3)
    encoder = trained_encoder(data, steps=150)
    shares = {}
    for selection in ("contrastive", "kmeans", "random"):
        rows = attack(selection, 0.4).poison(data, knowing(encoder), Seed(0)).rows
        shares[selection] = majority(data.labels, rows)[1]
    assert shares["random"] < 0.45
    assert max(shares["contrastive"], shares["kmeans"]) > 0.8
