"""Run a plan against a store: what is there is taken, what is missing is made, a failure is a record with a reason."""

from __future__ import annotations

import dataclasses
import re
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cupel
from cupel.errors import CupelError, DataError, Interrupted
from cupel.experiment.collecting import Collected
from cupel.experiment.plan import VIRTUAL, Step, plan
from cupel.experiment.spec import Experiment
from cupel.experiment.stages import STAGES
from cupel.experiment.store import Artefact, Store
from cupel.experiment.values import Context, Value
from cupel.feature_store import storing_features
from cupel.files import write_arrays
from cupel.implanting import file_content, shortened
from cupel.progress import say
from cupel.records import Record
from cupel.settings import canonical

__all__ = ["cell_name", "run_cell", "run_cells"]


class Runner:
    """Values by step: from memory, from the store, or made now.

    Args:
        store: Where artefacts stand.
        device: Where to compute.
    """

    def __init__(self, store: Store, device: str) -> None:
        self.store, self.device = store, device
        self.values: dict[str, Value] = {}
        self.log: list[dict[str, Any]] = []

    def value(self, step: Step) -> Value:
        """The value of a step; makes what is missing, inputs first."""
        if step.key not in self.values:
            self.values[step.key] = self._virtual(step) if step.stage in VIRTUAL else self._stored(step)
        return self.values[step.key]

    def _virtual(self, step: Step) -> Value:
        return STAGES[step.stage](step, [self.value(one) for one in step.inputs], Context(self.device, None))

    def _stored(self, step: Step) -> Artefact:
        artefact = self.store.find(step.stage, step.key)
        cached = artefact is not None
        if artefact is None:
            inputs = [self.value(one) for one in step.inputs]
            start = time.monotonic()
            twin = None if step.twin is None else self.value(step.twin).encoder
            context = Context(self.device, self.store.workspace(step.stage, step.key), twin)
            made = STAGES[step.stage](step, inputs, context)
            artefact = dataclasses.replace(made, seconds=time.monotonic() - start)
            self.store.save(step.stage, step.key, artefact)
        row = {"stage": step.stage, "method": step.name, "key": step.key, "cached": cached}
        self.log.append({**row, "seconds": round(artefact.seconds, 3)})
        return artefact


def _leaves(value: Any, key: str = "") -> list[str]:
    """The values inside a grid point that tell it from others, short enough for a file name."""
    if isinstance(value, dict):
        return [leaf for inner, one in value.items() for leaf in _leaves(one, inner)]
    if isinstance(value, list):
        return [leaf for one in value for leaf in _leaves(one)]
    if isinstance(value, bool):
        return [key if value else f"no_{key}"]
    return [Path(value).stem if key == "file" else str(value)]


def cell_name(experiment: Experiment, point: Mapping[str, Any]) -> str:
    """A file name for one cell: the experiment's name and the grid's values.

    Example:
        >>> from types import SimpleNamespace
        >>> cell_name(SimpleNamespace(name="exp"), {"seed": 1, "attack.trigger.size": 10})
        'exp--seed=1--size=10'
    """
    parts = [experiment.name]
    for path, value in point.items():
        parts.append(f"{path.rpartition('.')[2]}={'-'.join(_leaves(value))}")
    return re.sub(r"[^\w.=+-]+", "_", "--".join(parts))[:150]


def _known_content(name: str) -> str:
    """SHA-256 of a file for the record; a file that is not there is told by the plan."""
    try:
        return file_content(name)
    except DataError:
        return "missing"


def run_cell(
    experiment: Experiment, store: Store, *, command: str = "run", name: str | None = None, device: str = "cpu"
) -> tuple[Record, dict[str, np.ndarray[Any, Any]]]:
    """Run one cell.

    Returns:
        Its record, and the arrays for the report. A cell that cannot run gives a record with status `failed`, one whose
        data set or named file is not on this machine one with status `skipped`, each with a reason.

    Raises:
        Interrupted: what was done is in the store; run again to go on.
    """
    start = time.monotonic()
    name = name or experiment.name
    base = Record(
        command=command, name=name, cupel=cupel.__version__, seed=experiment.seed, device=device,
        threads=torch.get_num_threads(), settings=shortened(canonical(experiment, _known_content)),
    )  # fmt: skip
    runner = Runner(store, device)
    try:
        try:
            steps = plan(experiment)
        except DataError as error:  # a data set that is not here: the cells that need none of it go on
            return dataclasses.replace(base, status="skipped", reason=str(error), extra={"exit_code": 2}), {}
        say(f"{name}: {len(steps)} steps, {sum(store.has(s.stage, s.key) for s in steps)} in the store")
        for i, step in enumerate(steps, 1):
            there = store.has(step.stage, step.key)
            if step.stage not in VIRTUAL:
                say(f"[{i}/{len(steps)}] {step.name}" + (" (stored)" if there else ""))
            with storing_features(store.root / "features"):
                runner.value(step)
        collected = Collected(experiment)
        for step in steps:
            if step.stage not in VIRTUAL:
                collected.add(step, runner.value(step))
        base = dataclasses.replace(base, seconds=_seconds(runner.log, time.monotonic() - start), steps=runner.log)
        return collected.finish(base), collected.arrays
    except Interrupted:
        raise
    except CupelError as error:
        failed = dataclasses.replace(base, status="failed", reason=str(error), steps=runner.log)
        return dataclasses.replace(failed, extra={"exit_code": error.exit_code}), {}
    except (RuntimeError, MemoryError) as error:  # e.g. out of memory: the other cells of a grid go on
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        extra = {"exit_code": 2, "traceback": traceback.format_exc()}
        return dataclasses.replace(base, status="failed", reason=reason, steps=runner.log, extra=extra), {}


def _seconds(log: Sequence[Mapping[str, Any]], total: float) -> dict[str, float]:
    """Seconds by stage."""
    seconds: dict[str, float] = {}
    for row in log:
        seconds[row["stage"]] = round(seconds.get(row["stage"], 0.0) + row["seconds"], 3)
    return {**seconds, "total": round(total, 3)}


def run_cells(
    found: Sequence[tuple[Mapping[str, Any], Experiment]], out: Path, *, command: str = "run", device: str = "cpu"
) -> list[Record]:
    """Run all cells of a grid, one record each under `out/cells`, artefacts under `out/store`."""
    store, records, taken = Store(out / "store"), [], set[str]()
    for i, (point, experiment) in enumerate(found, 1):
        name = cell_name(experiment, point)
        name = f"{name}--{i}" if name in taken else name  # cut names may meet
        taken.add(name)
        record, arrays = run_cell(experiment, store, command=command, name=name, device=device)
        if point:
            record = dataclasses.replace(record, extra={**record.extra, "grid": dict(point), "cell": i})
        if arrays:
            write_arrays(out / "cells" / f"{name}.npz", arrays)
            record = dataclasses.replace(record, arrays=f"{name}.npz")
        record.write(out / "cells" / f"{name}.json")
        records.append(record)
    if all(record.status == "skipped" for record in records):  # nothing was done: that is a failure
        records = [dataclasses.replace(record, status="failed") for record in records]
        for record in records:
            record.write(out / "cells" / f"{record.name}.json")
    return records
