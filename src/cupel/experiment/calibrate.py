"""Scores of clean encoders of one recipe, as data that ships: `python -m cupel.experiment.calibrate EXPERIMENT …`.

Pre-trains clean encoders with seeds that no experiment uses by default, scans each, and writes the statistic that
verdicts are compared with. The attack and everything behind it are left out of the plan.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cupel
from cupel.encoders import ENCODERS
from cupel.experiment.plan import plan, recipe_of
from cupel.experiment.reading import read_experiment
from cupel.experiment.run import Runner
from cupel.experiment.spec import Experiment, cells
from cupel.experiment.store import Store
from cupel.files import write_json
from cupel.progress import Lines, reporting, say
from cupel.settings import method_name
from cupel.vet import default_chain

__all__ = ["calibrate"]

FIRST_SEED = 1000
LEAST = 1e-6  # sizes of 0 have no logarithm


def calibrate(experiment: Experiment, seeds: Sequence[int], budgets: Sequence[str], store: Store, out: Path) -> None:
    """Write one calibration file per scanner of the default chain and budget.

    Args:
        experiment: Its upstream and defender count.
        seeds: One clean encoder each. Those of which a scanner can say nothing are left out of its file.
        budgets: Presets of the chain.
        store: Artefacts; run again to go on.
        out: Folder of calibration files.
    """
    scanners: list[Any] = [one for budget in budgets for one in default_chain(budget)]
    sizes: dict[str, list[float]] = {scanner.name: [] for scanner in scanners}
    for seed in seeds:
        one = dataclasses.replace(experiment, seed=seed, attack=None, purify=(), scan=tuple(scanners))
        runner = Runner(store, "cpu")
        wanted = [step for step in plan(one) if step.stage == "scan"]
        for scanner, step in zip(scanners, wanted, strict=True):
            said = runner.value(step).values["verdict"]
            say(f"  seed {seed}, {scanner.name}: score {said['score']:.4f}")
            if said["verdict"] != "inconclusive":
                sizes[scanner.name].append(max(LEAST, 1 - float(said["score"])))
    recipe = recipe_of(experiment)
    for name, found in sizes.items():
        note = {
            "scanner": name,
            "recipe": recipe["id"],
            "architecture": method_name(experiment.upstream.encoder, ENCODERS),
            "scores": found,
            "about": f"Sizes (1 − score) for clean encoders: {recipe['text']}; seeds {seeds[0]} to {seeds[-1]}; "
            f"cupel {cupel.__version__}, {experiment.defender.size} images",
        }
        if found:
            write_json(out / f"{name.replace('/', '-')}-{experiment.name}.json", note)


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
