"""SSL-Cleanse: weights, clusters and knees by hand; on the planted toy the stamp towards the trigger is smallest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cupel.errors import SettingsError, UsageError
from cupel.inversion.clusterwise import ClusterSearch, invert_clusters
from cupel.scan.clusters import Clustering, choose_clusters, cluster, knee, merge_small, unit
from cupel.scan.neural_cleanse import anomaly_index
from cupel.scan.ssl_cleanse import CODE_CONSTANT, SSLCleanse
from cupel.seeds import Seed
from cupel.verdicts import Reference
from fingerprints import model_print
from planted import planted
from planted import unit as pixels

TOY = SSLCleanse(num_clusters=8, precision="fp32")


def blobs(centres: int, seed: int = 0, each: int = 100, apart: float = 12.0) -> Tensor:
    draw = Seed(seed).torch()
    middle = apart * torch.eye(8)[:centres]
    return (middle[:, None] + torch.randn(centres, each, 8, generator=draw)).flatten(0, 1)


def costs(outcomes: list[bool]) -> list[float]:
    search = ClusterSearch(steps=1)
    state, rows = search.begin(1), []
    for one in outcomes:
        state = search.after(state, torch.tensor([one]))
        rows.append(float(state.cost))
    return rows


def test_successes_set_and_raise_the_weight() -> None:
    cost = costs([True] * 19)
    at = {4: 0.0, 5: 0.1, 8: 0.1, 9: 0.15, 13: 0.15, 14: 0.225, 18: 0.225, 19: 0.3375}
    assert {i: cost[i - 1] for i in at} == pytest.approx(at)


def test_failures_change_nothing_before_the_first_weight_and_lower_it_afterwards() -> None:
    assert costs([False] * 20) == [0.0] * 20
    assert costs([True] * 4 + [False] + [True] * 4)[-1] == 0
    cost = costs([True] * 5 + [False] * 10)
    assert cost[8] == pytest.approx(0.1)
    assert cost[9] == pytest.approx(0.1 / 1.5)
    assert cost[14] == pytest.approx(0.1 / 1.5**2)


def test_clusters_have_weights_of_their_own() -> None:
    search = ClusterSearch(steps=1)
    state = search.begin(2)
    for _ in range(9):
        state = search.after(state, torch.tensor([True, False]))
    assert state.cost.tolist() == pytest.approx([0.15, 0.0])


def test_the_index_as_the_code_prints_it() -> None:
    usual = anomaly_index([60, 62, 64, 66, 68, 70, 15]).worst
    assert usual is not None
    assert usual * CODE_CONSTANT == pytest.approx(5.5731, abs=1e-4)


def test_knee_by_hand() -> None:
    assert knee([2, 3, 4, 5, 6], [20, 10, 0, 0, 0]) == (4, pytest.approx(0.5))
    assert knee([2, 3, 4], [3.0, 2.0, 1.0], window=1)[1] == pytest.approx(0)
    assert knee([2, 3], [1.0, 1.0]) == (2, 0.0)


def test_four_blobs_are_four_clusters_and_one_blob_has_no_knee() -> None:
    assert choose_clusters(blobs(4), range(2, 11), Seed(0), restarts=5) == (4, True)
    assert choose_clusters(blobs(1, each=400), range(2, 11), Seed(0), rounds=1) == (10, False)


def together(own: Tensor) -> Tensor:
    """Which pairs share a cluster."""
    return own[:, None] == own


def test_clusters_agree_between_seeds() -> None:
    points = blobs(4)
    a, b = (cluster(points, 4, Seed(s)) for s in (0, 1))
    assert torch.equal(together(a.own), together(b.own))
    assert torch.equal(together(a.own), together(torch.arange(4).repeat_interleave(100)))
    centre = torch.stack([points[a.own == k].mean(dim=0) for k in range(4)])
    assert torch.allclose(centre, a.centres, atol=1e-4)
    assert a.inertia == pytest.approx(float((points - centre[a.own]).square().sum()), rel=1e-4)


def test_small_clusters_are_merged_into_the_nearest() -> None:
    points = torch.tensor([[0.0, 0.0]] * 5 + [[9.0, 0.0]] * 5 + [[7.0, 0.0]] * 2)
    made = Clustering(
        torch.tensor([0] * 5 + [2] * 5 + [1] * 2), torch.tensor([[0.0, 0.0], [7.0, 0.0], [9.0, 0.0]]), 0.0
    )
    merged = merge_small(points, made, 3)
    assert merged.own.tolist() == [0] * 5 + [1] * 7
    assert merged.centres[1].tolist() == pytest.approx([59 / 7, 0.0])
    assert merge_small(points, made, 2) is made
    assert merge_small(points, made, 50) is made


def test_the_distance_lies_between_0_and_4_and_is_0_at_the_aim() -> None:
    seen = []

    def embed(x: Tensor) -> Tensor:
        z = torch.stack([x.mean(dim=(1, 2, 3)) - 0.5, 0 * x[:, 0, 0, 0] + 0.3], dim=1)  # light or dark
        seen.append(len(x))
        return z

    images = torch.cat([torch.full((20, 3, 4, 4), 250), torch.full((20, 3, 4, 4), 5)]).to(torch.uint8)
    own = torch.arange(2).repeat_interleave(20)
    z = embed(images.float() / 255)
    found = invert_clusters(embed, images, z, own, ClusterSearch(steps=60, batch_size=8, lr=0.5), Seed(0))
    assert found.found.all()
    assert found.reach.tolist() == [1, 1]
    # half of the image's light must be turned: (1 − m) 250/255 < ½ where the pattern is black
    assert all(0.45 < size < 0.7 for size in found.size.tolist())
    assert seen[1:] == [16] * 60


def test_the_cluster_along_the_planted_direction_has_the_smallest_stamp() -> None:
    for seed in (0, 1):
        toy = planted(20, 0.85, seed)
        said = TOY.scan(toy.encoder, toy.images.without_labels("ssl_cleanse"), Seed(0))
        count = int(said.details["clusters"])
        sizes = [said.details[f"size_{k}"] for k in range(count)]
        assert min(sizes) < 0.05
        assert sorted(sizes)[1] > 2 * min(sizes)
        best = min(said.evidence, key=lambda one: one.size)
        m, p = torch.from_numpy(best.mask), torch.from_numpy(best.pattern)
        with torch.no_grad():
            moved = toy.encoder((1 - m) * pixels(toy.images.inputs) + m * p) - toy.twin(pixels(toy.images.inputs))
        assert float(torch.cosine_similarity(moved.mean(dim=0), toy.encoder.module.v.detach(), dim=0)) > 0.8
        twin = TOY.scan(toy.twin, toy.images.without_labels("ssl_cleanse"), Seed(0))
        assert 1 - twin.score > 0.1
        # without references the sizes are compared with each other; with them the smallest with other encoders'
        clean = Reference(TOY.name, "toys", (0.12, 0.125, 0.13, 0.135, 0.14))
        assert TOY.scan(toy.encoder, toy.images, Seed(0), clean).verdict == "backdoored"
        assert TOY.scan(toy.twin, toy.images, Seed(0), clean).verdict == "clean-by-test"


def test_threshold_and_index_are_the_same_rule() -> None:
    toy = planted(20, 0.85, 0)
    said = TOY.scan(toy.twin, toy.images, Seed(0))
    details = said.details
    count = int(details["clusters"])
    sizes = [details[f"size_{k}"] for k in range(count)]
    assert said.score == pytest.approx(1 - min(sizes))
    assert said.threshold == pytest.approx(1 - (details["median"] - 2 * details["mad"]))
    assert (details["index"] > 2) == (said.score > said.threshold)
    assert details["index_as_coded"] == pytest.approx(0.6745 * details["index"])
    assert sum(details[f"members_{k}"] for k in range(count)) == 256


def test_nothing_found_is_inconclusive() -> None:
    toy = planted(20, 0.85, 0)
    said = SSLCleanse(num_clusters=6, steps=1).scan(toy.twin, toy.images, Seed(0))
    assert (said.verdict, said.score) == ("inconclusive", 0.0)
    assert "a stamp was found towards" in said.reason
    two = SSLCleanse(num_clusters=2, steps=1).scan(toy.twin, toy.images, Seed(0))
    assert "fall into 2 clusters" in two.reason


def test_same_seed_same_verdict_and_the_model_stays() -> None:
    toy = planted(25, 0.85, 0)
    before = model_print(toy.encoder.module)
    method = SSLCleanse(num_clusters=4, steps=12, batch_size=8)
    first, again, other = (method.scan(toy.encoder, toy.images, Seed(s)) for s in (5, 5, 6))
    assert first.to_json() == again.to_json() != other.to_json()
    assert model_print(toy.encoder.module) == before


def test_settings() -> None:
    assert [SSLCleanse.preset(b).name.split("/")[1] for b in ("smoke", "standard", "paper")] == [
        "smoke",
        "standard",
        "paper",
    ]
    standard = SSLCleanse.preset("standard")
    assert (standard.max_clusters, standard.steps, standard.batch_size) == (10, 40, 32)
    with pytest.raises(SettingsError, match="num_clusters"):
        SSLCleanse(num_clusters=1)
    with pytest.raises(UsageError, match="did you mean 'smoke'"):
        SSLCleanse.preset("smok")


def test_unit() -> None:
    assert torch.equal(unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
