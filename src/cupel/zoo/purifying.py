"""Purifiers on the backdoored encoders of a zoo: what each made of them, in one record per encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cupel.errors import UsageError
from cupel.experiment.plan import Step, file_content, plan
from cupel.experiment.run import Runner
from cupel.experiment.store import Store
from cupel.records import Metric, Record
from cupel.settings import canonical
from cupel.zoo.attempt import Built, Task, attempted, described, worked
from cupel.zoo.file import Member, Zoo, trigger_of
from cupel.zoo.looks import look_of
from cupel.zoo.making import claim
from cupel.zoo.parts import GIVEN, TWIN, Purification

__all__ = ["FOLDER", "purify_members", "purify_steps"]

FOLDER = "purified"
"""Folder of the records, inside the zoo's."""


def purify_steps(member: Member, zoo: Zoo) -> tuple[Step, ...]:
    """All steps up to the scores of purified encoders, of the encoder as given and of its clean twin."""
    task = _purification(zoo)
    scanners = tuple(
        one for name, one in zip(zoo.scanner_names, zoo.scanners, strict=False) if name in task.evidence
    )  # fmt: skip
    (down,) = member.experiment.downstream
    measured = dataclasses.replace(down, head_seeds=task.head_seeds, retuning=task.retuning)
    experiment = dataclasses.replace(
        member.experiment, scan=scanners, purify=tuple(task.methods.values()), downstream=(measured,),
        defender=dataclasses.replace(member.experiment.defender, labelled=task.labelled),
    )  # fmt: skip
    steps = plan(experiment, calibrated=False)
    evidence = [one for one in steps if one.stage == "scan" and one.name.endswith(": backdoored")]
    stages = ("check", "pretrain", "references", "implant", "purify", "score", "retune")
    return tuple(one for one in steps if one.stage in stages or one in evidence)


def purify_members(zoo: Zoo, out: Path, limit: int | None = None, device: str = "cpu") -> Built:
    """Purify what has been made, and write one record each to `out/purified`.

    Args:
        zoo: As read; it must name purifiers.
        out: Folder of a zoo whose encoders were built; those that were not are left.
        limit: Members at most that are worked on in this call.
        device: Where to compute.

    Raises:
        UsageError: the zoo names no purifiers, or the folder holds another zoo.
        Interrupted: what was done is in the store.
    """
    task = _purification(zoo)
    claim(zoo, out)
    store = Store(out / "store")
    wanted = [one for one in zoo.members if one.backdoored and one.half == task.half and (task.hard or not one.hard)]

    def task_of(member: Member) -> Task | None:
        steps = purify_steps(member, zoo)
        missing = [one for one in steps if not store.has(one.stage, one.key)]
        if any(one.stage in ("pretrain", "implant") for one in missing):
            return None
        return Task(steps, missing, lambda: _run(zoo, member, steps, missing, Runner(store, device)))

    return worked(wanted, task_of, out / FOLDER, limit)


def _purification(zoo: Zoo) -> Purification:
    if zoo.purification is None:
        raise UsageError(zoo.name, "names no purifiers", "list them under `purify.methods` of the file")
    return zoo.purification


def _run(zoo: Zoo, member: Member, steps: tuple[Step, ...], missing: list[Step], runner: Runner) -> Record:
    def make(step: Step) -> None:
        runner.value(step)

    def collect(base: Record) -> Record:
        return _collected(zoo, member, steps, runner, base)

    return attempted(member, runner, missing, make, collect, frozenset({"purify", "score", "retune"}))


def _collected(zoo: Zoo, member: Member, steps: tuple[Step, ...], runner: Runner, base: Record) -> Record:
    """The scores by purifier; `given` is the backdoored encoder, `twin` the clean one."""
    names = {"backdoored": GIVEN, "clean": TWIN}
    names |= {
        "purified" if i == 0 else f"purified-{i + 1}": name for i, name in enumerate(_purification(zoo).methods)
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {name: {"metrics": {}} for name in names.values()}
    purifying = [one for one in steps if one.stage == "purify"]
    for name, step in zip(_purification(zoo).methods, purifying, strict=True):
        if (made := runner.store.find(step.stage, step.key)) is not None:
            found[name] |= {"seconds": round(made.seconds, 3), "cost": dict(made.values)}
    for step in steps:
        if step.stage not in ("score", "retune"):
            continue
        made = runner.store.find(step.stage, step.key)
        if made is None:
            continue
        own = found[names[step.name.rpartition(": ")[2]]]
        prefix = "retuned_" if step.stage == "retune" else ""
        own["metrics"] |= {prefix + kind: _metric(counts) for kind, counts in made.values["counts"].items()}
        if step.stage == "score":
            own["companions"] = made.values["companions"]
    trigger = trigger_of(member)
    look = None if trigger is None else look_of(trigger, member.experiment.upstream.encoder.input_size)
    note = {
        **described(zoo, member),
        "area": None if look is None else look.area,
        "purified": found,
        "purify": canonical(_purification(zoo), file_content),
    }
    return dataclasses.replace(base, extra={"zoo": note})


def _metric(counts: Any) -> Mapping[str, Any]:
    return Metric.of([tuple(one) for one in counts]).to_json()
