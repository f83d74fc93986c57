"""`cupel run` and `cupel demo`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cupel import threads
from cupel.commands.shared import line, record_of
from cupel.experiment import cells, plan, read_experiment, run_cells
from cupel.experiment.run import cell_name
from cupel.experiment.store import Store
from cupel.records import Record
from cupel.report import load_cells, write_report

__all__ = ["demo", "run"]


def run(source: str, out: Path | None, changes: Sequence[str], dry_run: bool) -> int:
    """`cupel run`."""
    data, where = read_experiment(source)
    found = cells(data, where, changes)
    out = out or Path("runs") / found[0][1].name
    if dry_run:
        store = Store(out / "store")
        for point, experiment in found:
            print(cell_name(experiment, point))
            for step in plan(experiment):
                print(f"  {'stored' if store.has(step.stage, step.key) else 'to do ':<7} {step.key[:12]}  {step.name}")
        return 0
    threads.settle()
    return _run(found, out, "run")


def _run(found: Sequence[Any], out: Path, command: str) -> int:
    start = time.monotonic()
    records = run_cells(found, out, command=command)
    summary = records[0]
    if len(records) > 1:
        metrics = {f"{r.name}/{k}": m for r in records for k, m in r.metrics.items()}
        rows = [{"name": r.name, "status": r.status, "reason": r.reason} for r in records]
        summary = record_of(command, found[0][1].name, records[0].seed, start, metrics=metrics, extra={"cells": rows})
    elif summary.arrays is not None:
        summary = dataclasses.replace(summary, arrays=f"cells/{summary.arrays}")
    failed = [r for r in records if r.status == "failed"]
    if failed:
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in failed)
        summary = dataclasses.replace(summary, status="failed", reason=reasons)
    summary.write(out / "result.json")
    write_report(load_cells(out), out / "report.html", title=found[0][1].name)
    for record in records:
        _summarise(record)
    line("report", f"{out / 'report.html'}  {out / 'result.json'}")
    if failed:
        return max(int(r.extra.get("exit_code", 2)) for r in failed) if len(records) == 1 else 2
    return 0


def _summarise(record: Record) -> None:
    print(f"\n{record.name}" + ("" if record.status == "done" else f"  {record.status.upper()}: {record.reason}"))
    for name, metric in record.metrics.items():
        shown = (
            "not measurable" if metric.value is None else f"{metric.value:7.2%}  [{metric.low:.2%}, {metric.high:.2%}]"
        )
        print(f"  {name:<44}{shown}  n {metric.n}, seeds {metric.seeds}")
    for which, verdict in record.verdicts.items():
        numbers = f"score {verdict['score']:.3f}, threshold {verdict['threshold']:.3f}"
        print(f"  scan of {which:<36}{verdict['verdict']}  {numbers}")
    if "total" in record.seconds:
        print(f"  {record.seconds['total']:.1f} s")


def demo(out: Path, seed: int, data: str) -> int:
    """`cupel demo`."""
    threads.settle()
    content, where = read_experiment(f"demo-{data}")
    return _run(cells(content, where, [f"seed={seed}"]), out, "demo")
