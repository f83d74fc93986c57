"""Members' steps through the store, with a record of each whatever happens."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import cupel
from cupel.errors import CupelError, Interrupted
from cupel.experiment.plan import Step, file_content
from cupel.experiment.run import Runner
from cupel.feature_store import storing_features
from cupel.implanting import shortened
from cupel.progress import say
from cupel.records import Record
from cupel.settings import canonical
from cupel.zoo.file import Member, Zoo

__all__ = ["Built", "Task", "attempted", "described", "worked"]


@dataclasses.dataclass(frozen=True)
class Built:
    """What a call that works on members did.

    Args:
        done: Members that had something to do and were finished.
        stored: Members that were there already.
        failed: Records with a reason, or with a note of a step that failed.
        left: Members that are still to do.
    """

    done: int
    stored: int
    failed: tuple[Record, ...]
    left: int


@dataclasses.dataclass(frozen=True)
class Task:
    """One member's work: its steps, those that are not in the store, and what makes them and a record."""

    steps: Sequence[Step]
    missing: Sequence[Step]
    run: Callable[[], Record]


def worked(
    members: Sequence[Member], task_of: Callable[[Member], Task | None], folder: Path, limit: int | None
) -> Built:
    """Do what is missing, and write one record each.

    Args:
        members: In this order.
        task_of: The work on one; None = it cannot be done yet.
        folder: Of the records; they are written anew each time, for the file may call a member otherwise now.
        limit: Members at most that have something to do; None = all.

    Raises:
        Interrupted: what was done is in the store.
    """
    done = stored = left = tried = 0
    failed: list[Record] = []
    for i, member in enumerate(members, 1):
        task, path = task_of(member), folder / f"{member.name}.json"
        if task is None or (task.missing and limit is not None and tried >= limit):
            left += 1
            continue
        if task.missing:
            tried += 1
            say(f"[{i}/{len(members)}] {member.name}: {len(task.missing)} of {len(task.steps)} steps to do")
        found = task.run()
        if not task.missing and path.is_file() and (before := Record.read(path)).status == found.status == "done":
            kept = ("cupel", "device", "threads", "seconds", "steps")  # how it was made, which was not now
            found = dataclasses.replace(found, **{name: getattr(before, name) for name in kept})
        found.write(path)
        if found.status != "done":
            say(f"  failed: {found.reason}")
        if found.status != "done" or found.notes:
            failed.append(found)
        elif task.missing:
            done += 1
        else:
            stored += 1
    return Built(done, stored, tuple(failed), left)


def described(zoo: Zoo, member: Member) -> dict[str, Any]:
    """What records say of a member."""
    return {
        "zoo": zoo.name,
        "family": member.family,
        "half": member.half,
        "hard": member.hard,
        "backdoored": member.backdoored,
        "attack": member.attack_name,
    }


def attempted(
    member: Member,
    runner: Runner,
    steps: Sequence[Step],
    make: Callable[[Step], None],
    collect: Callable[[Record], Record],
    tolerated: frozenset[str],
) -> Record:
    """Make steps and collect a record; an error makes it `failed`, with a reason.

    Args:
        member: Whose steps.
        runner: Of the zoo's store.
        steps: What is to be made, inputs first.
        make: Makes one.
        collect: Completes a record with what is in the store.
        tolerated: Stages that may fail: that is a note, and steps that need what is missing are left out.

    Raises:
        Interrupted: what was done is in the store.
    """
    start = time.monotonic()
    experiment = member.experiment
    base = Record(
        command="zoo", name=member.name, cupel=cupel.__version__, seed=experiment.seed, device=runner.device,
        threads=torch.get_num_threads(), settings=shortened(canonical(experiment, file_content)),
    )  # fmt: skip
    troubles: list[str] = []
    lost: set[str] = set()
    try:
        for step in steps:
            if lost & {one.key for one in step.inputs}:
                lost.add(step.key)
                continue
            say(f"  {step.name}")
            try:
                with storing_features(runner.store.root / "features"):
                    make(step)
            except CupelError as error:
                if step.stage not in tolerated or isinstance(error, Interrupted):
                    raise
                say(f"  {step.name}: {error}")
                troubles.append(f"{step.name}: {error}")
                lost.add(step.key)
        made = collect(dataclasses.replace(base, seconds={"total": round(time.monotonic() - start, 3)}))
        return dataclasses.replace(made, steps=runner.log, notes=troubles)
    except Interrupted:
        raise
    except CupelError as error:
        failed = dataclasses.replace(base, status="failed", reason=str(error), steps=runner.log)
        return dataclasses.replace(failed, extra={"exit_code": error.exit_code})
    except (RuntimeError, MemoryError) as error:  # e.g. out of memory: the other members go on
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        extra = {"exit_code": 2, "traceback": traceback.format_exc()}
        return dataclasses.replace(base, status="failed", reason=reason, steps=runner.log, extra=extra)
