"""Reach in an experiment: who is measured with what, where the numbers go, and that nobody else's key changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import experiments
from cupel.errors import SettingsError
from cupel.experiment import cells, plan, run_cells
from cupel.records import Record
from cupel.report.cells import load_cells
from cupel.report.html import render_report

QUICK = {
    "epsilons": [8], "images": 12, "batch_size": 8, "universal_rounds": 1, "blend_steps": 1, "cbd": {"pgd_steps": 1}
}  # fmt: skip
TINY: dict[str, Any] = {
    **experiments.TINY,
    "downstream": {"data": "digits", "target_class": 1, "head_seeds": 1},
    "purify": [{"method": "clp"}, {"method": "clp", "u": 9.0}],
}


def experiment(**changes: Any) -> Any:
    return experiments.tiny_cells(TINY, **changes)


def steps(**changes: Any) -> dict[str, Any]:
    return experiments.planned(TINY, **changes)


def test_clean_attacked_and_purified_encoders_are_measured_with_their_own_scans() -> None:
    found = steps(reach=QUICK, scan=["decree"])
    names = [name for name in found if name.startswith("reach")]
    assert names == ["reach: clean", "reach: backdoored", "reach: purified", "reach: purified-2"]
    encoder, test, goals, scan = found["reach: purified"].inputs
    assert (encoder.name, goals.stage, scan.name) == ("purify clp", "implant", "scan decree: purified")
    assert test.name.startswith("test images")
    assert len({found[name].seed.value for name in names}) == 1
    assert list(found["describe"].method["reached"]) == [name.partition(": ")[2] for name in names]


def test_nobody_else_has_another_key() -> None:
    with_it, without = steps(reach=QUICK), steps()
    assert set(with_it) - set(without) == {name for name in with_it if name.startswith("reach")}
    changed = {name for name in without if without[name].key != with_it[name].key}
    assert changed == {"describe"}
    assert "reached" not in without["describe"].method


def test_without_an_attack_there_is_nothing_to_reach() -> None:
    plain = {key: value for key, value in TINY.items() if key not in ("attack", "purify")}
    found = [step.name for step in plan(cells({**copy.deepcopy(plain), "reach": QUICK}, "tiny.yaml")[0][1])]
    assert not any(name.startswith("reach") for name in found)


def test_a_wrong_radius_is_named() -> None:
    with pytest.raises(SettingsError, match=r"tiny\.yaml\.reach.*255, got 300"):
        experiment(reach={"epsilons": [300]})


def test_numbers_reach_the_record_the_map_and_the_page(tmp_path: Path) -> None:
    (record,) = run_cells(experiment(reach=QUICK, purify=["clp"]), tmp_path)
    assert record.status == "done", record.reason
    told = Record.read(tmp_path / "cells" / "tiny.json").extra["reach"]
    assert set(told) == {"clean", "backdoored", "purified"}
    for one in told.values():
        assert one["images"] == 12
        assert set(one["reach"]) == {"clean", "triggered", "linf-8", "patch", "universal", "blends"}
        assert one["reach"]["clean"]["moved"] == pytest.approx(0.0, abs=1e-6)
        assert one["reach"]["linf-8"]["moved"] > 1e-6
        assert one["reach"]["triggered"]["inside"] > 0.9
    with np.load(tmp_path / "cells" / "tiny.npz") as arrays:
        for which in told:
            group = arrays[f"map/{which}/group"]
            assert [int((group == kind).sum()) for kind in (-3, -4)] == [12, 12]
            assert len(arrays[f"map/{which}/points"]) == len(group)
        assert not any(name.startswith("stand_in") for name in arrays.files)
    page = render_report(load_cells(tmp_path))
    assert "Do stand-ins come to where triggered images lie?" in page
