"""Scores of clean encoders of one recipe, as data that ships: `python -m cupel.experiment.calibrate EXPERIMENT …`.

Pre-trains clean encoders with seeds that no experiment uses by default, scans each, and writes the statistic that
verdicts are compared with. The attack and everything behind it are left out of the plan.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import cupel
from cupel.experiment.plan import plan, recipe_of
from cupel.experiment.reading import read_experiment
from cupel.experiment.run import Runner
from cupel.experiment.spec import Experiment, cells
from cupel.experiment.store import Store
from cupel.files import write_json
from cupel.progress import Lines, reporting, say
from cupel.scan import Decree

__all__ = ["calibrate"]

FIRST_SEED = 1000


def calibrate(experiment: Experiment, seeds: Sequence[int], budgets: Sequence[str], store: Store, out: Path) -> None:
    """Write one calibration file per budget.

    Args:
        experiment: Its upstream and defender count.
        seeds: One clean encoder each.
        budgets: Presets of DECREE.
        store: Artefacts; run again to go on.
        out: Folder of calibration files.
    """
    scores: dict[str, list[float]] = {budget: [] for budget in budgets}
    scanners = tuple(Decree.preset(budget) for budget in budgets)
    for seed in seeds:
        one = dataclasses.replace(experiment, seed=seed, attack=None, purify=(), scan=scanners)
        runner = Runner(store, "cpu")
        wanted = [step for step in plan(one) if step.stage == "scan"]
        for budget, step in zip(budgets, wanted, strict=True):
            say(f"seed {seed}: {step.name} ({budget})")
            details = runner.value(step).values["verdict"]["details"]
            scores[budget].append(float(details["pl1"]))
            say(f"  PL1 {details['pl1']:.4f}")
    architecture = next(step.method["encoder"] for step in plan(experiment) if step.stage == "pretrain")
    recipe = recipe_of(experiment)
    for budget, found in scores.items():
        note = {
            "scanner": f"decree/{budget}",
            "recipe": recipe["id"],
            "architecture": type(architecture).__name__.lower(),
            "scores": found,
            "about": f"PL1-norms of clean encoders: {recipe['text']}; seeds {seeds[0]} to {seeds[-1]}; "
            f"cupel {cupel.__version__}, {experiment.defender.size} images",
        }
        write_json(out / f"decree-{budget}-{experiment.name}.json", note)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment")
    parser.add_argument("--seeds", type=int, default=8, help="number of clean encoders")
    parser.add_argument("--budgets", nargs="+", default=["smoke", "standard"])
    parser.add_argument("--store", type=Path, default=Path("runs/calibration/store"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "calibration")
    arguments = parser.parse_args()
    content, where = read_experiment(arguments.experiment)
    experiment = cells(content, where)[0][1]
    with reporting(Lines(every=20)):
        seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
        calibrate(experiment, seeds, arguments.budgets, Store(arguments.store), arguments.out)


if __name__ == "__main__":
    main()
