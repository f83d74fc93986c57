"""Robust z, its floor, false alarms and calibration files, by hand."""

from __future__ import annotations

import importlib.resources
import json
import math
from pathlib import Path

import pytest

from cupel.errors import DataError
from cupel.scan import Decree, Indicators, PScan, SSLCleanse, read_reference, shipped_reference
from cupel.scan.decree import decide
from cupel.scan.reference import ENOUGH, leave_one_out, robust_z, size_at
from cupel.verdicts import Reference
from cupel.vet import default_chain

E = math.e


def test_robust_z_by_hand() -> None:
    clean = [E**-1, E**-1.5, E**-2, E**-2.5, E**-3]  # median −2, MAD 0.5
    assert robust_z(E**-2, clean) == pytest.approx(0)
    assert robust_z(E**-4, clean) == pytest.approx(-2 / (1.4826 * 0.5))
    assert size_at(-3, clean) == pytest.approx(E ** (-2 - 3 * 1.4826 * 0.5))
    assert size_at(10, clean) == 1


def test_equal_references_do_not_make_everything_an_outlier() -> None:
    clean = [0.2] * 5
    assert robust_z(0.19, clean) > -1
    assert size_at(-3, clean) == pytest.approx(0.2 * math.exp(-3 * 0.14826))


def test_a_mask_of_zero_has_a_finite_z() -> None:
    assert math.isfinite(robust_z(0.0, [0.2] * 5))


def test_false_alarms_are_counted_leaving_each_out() -> None:
    assert leave_one_out([0.2, 0.21, 0.19, 0.2, 0.22, 0.05]) == (1 / 6, 6)
    assert leave_one_out([0.2, 0.21, 0.19, 0.2, 0.22]) == (0, 5)


def calibrated(pl1: float) -> str:
    return decide(pl1, 0.99, Reference("decree/smoke", "test", (0.2,) * 5)).verdict


def test_the_rule_with_references() -> None:
    spread = 1.4826 * 0.1
    at = lambda z: 0.2 * math.exp(z * spread)
    assert [calibrated(at(z)) for z in (-3.1, -2.9, -2.1, -1.9, 1)] == [
        "backdoored",
        "suspicious",
        "suspicious",
        "clean-by-test",
        "clean-by-test",
    ]
    said = decide(0.03, 0.99, Reference("decree/smoke", "digits", (0.2,) * 5))
    assert said.threshold == pytest.approx(at(-3))
    assert said.false_alarm == (0, 5)
    assert said.z == pytest.approx(math.log(0.03 / 0.2) / spread)
    assert "digits" in said.reason
    assert "uncalibrated" not in said.reason


def test_the_rule_without_references() -> None:
    cases = [(0.04, 0.0), (0.07, 0.96), (0.07, 0.94), (0.11, 1.0)]
    said = [decide(pl1, transfer) for pl1, transfer in cases]
    assert [one.verdict for one in said] == ["backdoored", "backdoored", "suspicious", "clean-by-test"]
    assert all(one.threshold == 0.10 and one.false_alarm is None and "uncalibrated" in one.reason for one in said)


def test_four_references_are_too_few() -> None:
    said = decide(0.04, 0.0, Reference("decree/smoke", "test", (0.04,) * 4))
    assert said.verdict == "backdoored"
    assert "4 clean encoders are too few" in said.reason


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    good = {"scanner": "decree/smoke", "recipe": "r", "architecture": "fast32", "scores": [0.2, 0.25, 1], "about": ""}
    file.write_text(json.dumps(good))
    assert read_reference(file) == Reference("decree/smoke", "r", (0.2, 0.25, 1.0))
    for bad in (
        [],
        {"scores": [0.2]},
        good | {"scores": []},
        good | {"scores": [0.2, 0]},
        good | {"scores": [True]},
        good | {"scores": "0.2"},
        good | {"scores": [1.5]},
    ):
        file.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=r"one\.json"):
            read_reference(file)
    assert shipped_reference("decree/smoke", "no such architecture") is None


def test_shipped_calibrations_belong_to_budgets_that_exist() -> None:
    """A changed default or a renamed budget would leave them unused without a word."""
    variants = ("stamp", "linf", "frequency")
    names = {Decree.preset(budget, variant).name for budget in Decree.budgets for variant in variants}
    names |= {cls.preset(budget).name for cls in (PScan, SSLCleanse, Indicators) for budget in cls.budgets}
    folder = importlib.resources.files("cupel") / "calibration"
    shipped = [json.loads(file.read_text("utf-8")) for file in folder.iterdir() if file.name.endswith(".json")]
    assert shipped
    assert {one["scanner"] for one in shipped} <= names
    assert len(names) == 18


def test_every_shipped_calibration_is_found_and_stands_alone() -> None:
    folder = importlib.resources.files("cupel") / "calibration"
    files = [read_reference(Path(str(one))) for one in folder.iterdir() if one.name.endswith(".json")]
    keys = [(one.scanner, one.recipe) for one in files]
    assert len(set(keys)) == len(keys), "two files for one scanner and recipe: neither would be used"
    assert all(len(one.scores) >= ENOUGH for one in files)
    for budget in ("smoke", "standard"):
        names = {getattr(scanner, "name", "") for scanner in default_chain(budget)}
        for recipe in {recipe for scanner, recipe in keys if scanner == f"decree/{budget}"}:
            assert {scanner for scanner, one in keys if one == recipe} >= names - {"decree/linf-smoke"}
            assert shipped_reference(f"decree/{budget}", "fast", recipe) is not None
