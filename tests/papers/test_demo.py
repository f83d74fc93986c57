"""The demo holds its floor on seeds that nobody tuned on. Minutes each: `make slow`."""

from __future__ import annotations

import json

import pytest

from cupel.cli import main


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("data", "seed"), [("digits", 7), ("digits", 8), ("shapes", 7)])
def test_demo_holds_its_floor(tmp_path, data, seed):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(tmp_path), "--seed", str(seed), "--data", data])
    assert not stop.value.code
    result = json.loads((tmp_path / "result.json").read_text())
    value = {name: metric["value"] for name, metric in result["metrics"].items()}
    assert result["seed"] == seed
    assert value["attack_success_rate"] >= 0.90
    assert value["attack_success_rate_baseline"] <= 0.15
    assert value["backdoored_accuracy"] >= value["clean_accuracy"] - 0.03
    assert value["purified_attack_success_rate"] <= 0.30  # the floor; the aim is the baseline plus 0.10
    assert value["purified_accuracy"] >= value["clean_accuracy"] - 0.04
    assert result["verdicts"]["backdoored"]["verdict"] == "backdoored"
    assert result["verdicts"]["clean"]["verdict"] != "backdoored"
    assert (tmp_path / "report.html").stat().st_size > 50_000
