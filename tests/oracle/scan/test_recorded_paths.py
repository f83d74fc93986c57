"""What inversions write down along the way: size and reach of every batch, and the clean scores of a verdict."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from cupel.inversion import Budget, invert
from cupel.scan import Decree
from cupel.scan.judging import Judging
from cupel.scan.reference import Decision, against
from cupel.seeds import Seed
from cupel.verdicts import Evidence, Reference, Verdict
from cupel.vet import evidence_arrays, scan_evidence
from cupel.vet.chain import together
from planted import planted


def test_a_path_holds_size_and_reach_of_every_batch_and_nothing_after_a_start_left() -> None:
    seen: dict[int, list[float]] = {0: [], 1: [], 2: []}

    def objective(stamped: Tensor, starts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        covered = stamped.mean(dim=(1, 2, 3, 4))
        reach = (starts == 1).float() + 0.01 * len(seen[0])
        for start, one in zip(starts.tolist(), reach.tolist(), strict=True):
            seen[start].append(one)
        return -1e4 * covered, reach

    black = torch.zeros(8, 3, 6, 6, dtype=torch.uint8)
    found = invert(objective, black, 3, Budget(steps=20, batch_size=4, patience=3), Seed(0))
    assert found.path is not None
    assert found.path.shape == (3, 20, 2)
    assert found.steps.tolist() == [20, 6, 20]
    for start, steps in enumerate(found.steps.tolist()):
        assert found.path[start, :steps, 1].tolist() == pytest.approx(seen[start])
        assert bool(found.path[start, :steps].isfinite().all())
        assert bool(found.path[start, steps:].isnan().all())
    # the size that was kept is the smallest that was tried with success
    assert found.path[1, :6, 0].min() == found.size[1]
    assert found.path[0, -1, 0] == pytest.approx(float(found.mask[0].mean()), rel=1e-6)  # never reached: the last one


def test_decree_gives_each_start_its_path_and_the_goal() -> None:
    toy = planted(20, 0.85, seed=1)
    verdict = Decree(steps=12, batch_size=16, num_seeds=2).scan(toy.encoder, toy.images, Seed(0))
    assert verdict.details["goal"] == 0.99
    for one in verdict.evidence:
        assert one.path is not None
        assert one.path.dtype == np.float32
        assert one.path.shape == (12, 2)
        good = one.path[:, 1] > 0.99
        assert one.converged == bool(good.any())
        assert one.size == (one.path[good, 0].min() if good.any() else 1.0)


def test_paths_are_stored_and_older_files_do_without() -> None:
    mask, pattern = np.ones((2, 2), np.float32), np.ones((3, 2, 2), np.float32)
    path = np.array([[0.5, 0.9], [0.25, 0.99]], np.float32)
    found = (Evidence(mask, pattern, 0.25, True, "a start 0", path), Evidence(mask, pattern, 1.0, False, "a start 1"))
    verdict = Verdict("suspicious", 0.75, 0.9, "stamps", found)
    arrays = evidence_arrays(verdict)
    assert sorted(arrays) == [
        "inverted/0/mask", "inverted/0/path", "inverted/0/pattern", "inverted/1/mask", "inverted/1/pattern"
    ]  # fmt: skip
    back = scan_evidence(verdict.to_json(), arrays)
    assert np.array_equal(back[0].path, path)
    assert back[1].path is None
    del arrays["inverted/0/path"]
    assert [one.path for one in scan_evidence(verdict.to_json(), arrays)] == [None, None]


def test_a_calibrated_verdict_carries_the_clean_scores_in_the_unit_of_its_own() -> None:
    sizes = (0.2, 0.21, 0.19, 0.25, 0.2)
    said = against(0.05, Reference("decree/smoke", "digits", sizes), "size 0.05")
    assert isinstance(said, Decision)
    assert said.clean == sizes
    verdict = Decree.preset("smoke").concluded(said, 1 - 0.05, (), {}, torch.device("cpu"))
    assert verdict.clean_scores == pytest.approx([0.8, 0.79, 0.81, 0.75, 0.8])
    assert verdict.score > verdict.threshold > max(verdict.clean_scores)
    assert verdict.to_json()["clean_scores"] == list(verdict.clean_scores)
    others = dataclasses.replace(verdict, verdict="clean-by-test", clean_scores=())
    assert together([("pscan", others), ("decree", verdict)]).clean_scores == verdict.clean_scores


def test_without_a_calibration_there_are_no_clean_scores() -> None:
    scanner: Judging = Decree.preset("smoke")
    bare = scanner.concluded(Decision("suspicious", 0.1, "why"), 0.95, (), {}, torch.device("cpu"))
    assert bare.clean_scores == ()
    assert bare.to_json()["clean_scores"] == []
    assert scanner.inconclusive("why", torch.device("cpu")).clean_scores == ()
