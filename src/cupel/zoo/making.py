"""Making a zoo: every step through the store, so that a second call goes on where the first one ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cupel.encoders import ENCODERS
from cupel.errors import UsageError
from cupel.experiment.plan import Step, file_content, plan, recipe_of
from cupel.experiment.run import Runner
from cupel.experiment.store import Artefact, Store
from cupel.files import read_json, write_json
from cupel.implanting import shortened
from cupel.pretrain import OBJECTIVES
from cupel.protocols import Scanner
from cupel.records import Metric, Record
from cupel.settings import canonical, digest, method_name
from cupel.verdicts import ORDER
from cupel.zoo.attempt import Built, Task, attempted, described, worked
from cupel.zoo.entries import MANIFEST
from cupel.zoo.file import Member, Zoo, trigger_of
from cupel.zoo.looks import Look, look_of, overlap
from cupel.zoo.meta import base_of, learns, scan_with_reference, with_base

__all__ = ["Only", "build", "claim", "steps_of"]

Only = Literal["clean", "attacked", "scan"]
_METRICS = {
    "clean": {"accuracy": "clean_accuracy", "attack_success_rate": "attack_success_rate_baseline"},
    "backdoored": {"accuracy": "backdoored_accuracy", "attack_success_rate": "attack_success_rate"},
}


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Steps of one member: to make the encoder and measure its backdoor, and to scan it."""

    make: tuple[Step, ...]
    scan: tuple[Step, ...]

    @property
    def encoder(self) -> Step:
        """The one whose encoder is scanned."""
        made = {one.stage if one.name != "pretrain backdoored" else one.name: one for one in self.make}
        return made.get("implant") or made.get("pretrain backdoored") or made["pretrain"]


def steps_of(member: Member, zoo: Zoo) -> _Steps:
    """What is to be run for one member, each step after its inputs.

    It is the plan of its experiment without pictures; scans are made without references, for those come from the zoo.
    Scanners that learn from shadow models get theirs from a clean encoder of the calibration half.
    """
    scanners = zoo.scanners_of(member)
    found = _planned(member, scanners)
    if not any(learns(one) for one in scanners):
        return found
    base = _planned(base_of(member, zoo.members), scanners)
    pairs = zip(found.scan, base.scan, strict=True)
    scan = tuple(with_base(one, own) if learns(one.method["scanner"]) else one for one, own in pairs)
    return dataclasses.replace(found, scan=scan)


def _planned(member: Member, scanners: Sequence[Scanner]) -> _Steps:
    which = "backdoored" if member.attacked else "clean"
    steps = plan(dataclasses.replace(member.experiment, scan=tuple(scanners)), calibrated=False)
    stages = ("check", "pretrain", "references", "implant", "score")
    make = tuple(one for one in steps if one.stage in stages and one.name != "pretrain public")  # see `base_of`
    scan = tuple(_without_reference(one) for one in steps if one.stage == "scan" and one.name.endswith(f": {which}"))
    return _Steps(make, scan)


def _without_reference(step: Step) -> Step:
    """The same scan without what its scanner learns beforehand: the zoo makes that once for all members."""
    inputs = step.inputs[:2]  # encoder and images
    plain = ["scan", canonical(step.method, file_content), [one.key for one in inputs], step.seed.value]
    return dataclasses.replace(step, inputs=inputs, key=digest(plain))


def build(zoo: Zoo, out: Path, only: Only | None = None, limit: int | None = None, device: str = "cpu") -> Built:
    """Make the members of a zoo, and write one record each to `out/cells`; artefacts go to `out/store`.

    Args:
        zoo: As read.
        out: Folder; give it again to go on.
        only: `clean` or `attacked`: make these encoders, and scan none; `scan`: scan what has been made.
            None = make and scan all, clean ones first.
        limit: Members at most that are worked on in this call; None = all.
        device: Where to compute.

    Returns:
        What was done. A member that cannot be made has a record with status `failed`, and the others go on; one that a
        scanner cannot scan has a note and the other scans.

    Raises:
        DataError: a data set is not on this machine.
        UsageError: the folder holds another zoo.
        Interrupted: what was done is in the store.
    """
    claim(zoo, out)
    store = Store(out / "store")
    wanted = [one for one in zoo.members if only in (None, "scan") or one.attacked == (only == "attacked")]

    def task_of(member: Member) -> Task | None:
        steps = steps_of(member, zoo)
        if only == "scan" and not all(store.has(one.stage, one.key) for one in steps.make):
            return None
        todo = [*(() if only == "scan" else steps.make), *(steps.scan if only in (None, "scan") else ())]
        missing = [one for one in todo if not store.has(one.stage, one.key)]
        return Task(todo, missing, lambda: _run(zoo, member, steps, missing, Runner(store, device)))

    return worked(wanted, task_of, out / "cells", limit)


def claim(zoo: Zoo, out: Path) -> None:
    """Write which members the folder is for: records of members that the file no longer has are not read."""
    path = out / MANIFEST
    if path.is_file() and (known := read_json(path).get("zoo")) != zoo.name:
        raise UsageError(out, f"holds the zoo {known}, not {zoo.name}", "choose another --out")
    names = {"members": [one.name for one in zoo.members], "scanners": list(zoo.scanner_names)}
    write_json(path, {"zoo": zoo.name, **names, "chain": list(zoo.chain)})


def _run(zoo: Zoo, member: Member, steps: _Steps, missing: Sequence[Step], runner: Runner) -> Record:
    def made(step: Step) -> None:
        if step.stage == "scan" and "base" in step.method:
            scan_with_reference(step, runner)
        else:
            runner.value(step)

    def collected(base: Record) -> Record:
        return _collected(zoo, member, steps, runner, base)

    return attempted(member, runner, missing, made, collected, frozenset({"scan"}))


def _collected(zoo: Zoo, member: Member, steps: _Steps, runner: Runner, base: Record) -> Record:
    experiment = member.experiment
    metrics: dict[str, Metric] = {}
    target = experiment.downstream[0].target_class
    for step in steps.make:
        if step.stage == "score":
            values = runner.value(step).values
            which = step.name.rpartition(": ")[2]
            for kind, name in _METRICS[which].items():
                if kind in values["counts"]:
                    metrics[name] = Metric.of([tuple(one) for one in values["counts"][kind]])
            target = values["target_class"] if which == "backdoored" else target
    trigger = trigger_of(member)
    size = experiment.upstream.encoder.input_size
    look = None if trigger is None else look_of(trigger, size)
    scans = {
        step.method["scanner"].name: _scanned(runner.store.find(step.stage, step.key), look)
        for step in steps.scan
        if runner.store.has(step.stage, step.key)
    }
    shown = None
    if look is not None:
        plain = shortened(canonical(trigger, file_content))
        shown = {"settings": plain, "look": look.digest, "area": look.area, "fixed": look.fixed}
    note = {
        **described(zoo, member),
        "target_class": target if member.backdoored else None,
        "trigger": shown,
        "recipe": recipe_of(experiment),
        "architecture": method_name(experiment.upstream.encoder, ENCODERS),
        "objective": method_name(experiment.upstream.objective, OBJECTIVES),
        "data": experiment.upstream.data,
        "encoder": steps.encoder.key,
        "scans": scans,
    }
    which = "backdoored" if member.attacked else "clean"
    words = [one["verdict"] for one in scans.values()]
    worst = max(words, key=lambda one: ORDER.index(one["verdict"])) if words else None
    return dataclasses.replace(
        base,
        metrics=metrics,
        verdicts={which: worst} if worst else {},
        extra={"zoo": note},
    )


def _scanned(artefact: Artefact | None, look: Look | None) -> dict[str, Any]:
    """A scan as it is written down, with the overlap of the best inverted trigger and the true one."""
    assert artefact is not None
    verdict = artefact.values["verdict"]
    best = None
    if look is not None and look.fixed and verdict["evidence"]:
        converged = [i for i, one in enumerate(verdict["evidence"]) if one["converged"]]
        if converged:
            smallest = min(converged, key=lambda i: verdict["evidence"][i]["size"])
            best = overlap(artefact.arrays[f"inverted/{smallest}/mask"], look.mask)
    return {
        "verdict": {**verdict, "peak_memory_mib": artefact.values.get("peak_memory_mib")},
        "seconds": round(artefact.seconds, 3),
        "overlap": None if best is None else dataclasses.asdict(best),
    }
