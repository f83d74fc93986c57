"""Scanners that learn from shadow models: their reference is made once, beside the calibration half."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Sequence
from typing import Any

from cupel.experiment.plan import Step, file_content
from cupel.experiment.run import Runner
from cupel.experiment.store import Artefact
from cupel.progress import say
from cupel.scan.mntd_reference import MetaReference, read_meta_reference
from cupel.seeds import Seed
from cupel.settings import canonical, digest
from cupel.types import Dataset
from cupel.zoo.file import Member

__all__ = ["base_of", "learns", "scan_with_reference", "with_base"]


def learns(scanner: Any) -> bool:
    """Whether a scanner trains a reference of its own, as MNTD does."""
    return hasattr(scanner, "train_reference")


def base_of(member: Member, members: Sequence[Member]) -> Member:
    """The clean encoder that shadow models of a member are made from: the first one of the calibration half whose
    images are as large. It is never in the test half.

    Raises:
        LookupError: there is none.
    """
    size = member.experiment.upstream.encoder.input_size
    for one in members:
        if one.half == "calibration" and not one.attacked and one.experiment.upstream.encoder.input_size == size:
            return one
    raise LookupError(f"no clean encoder of the calibration half takes {size} px")


def with_base(step: Step, base: Step) -> Step:
    """A scan whose key knows what its reference is made from.

    Args:
        step: Scan of a member.
        base: The same scanner's scan of the base, whose inputs are the base encoder and the defender's images there.
    """
    plain = ["scan with shadows", step.key, [one.key for one in base.inputs], base.seed.value]
    return dataclasses.replace(step, method={**step.method, "base": base}, key=digest(plain))


def scan_with_reference(step: Step, runner: Runner) -> Artefact:
    """Make the reference where it is not there yet, scan, and store what was said."""
    scanner = step.method["scanner"]
    reference = _reference(scanner, step.method["base"], runner)
    encoder, images = runner.value(step.inputs[0]).encoder, runner.value(step.inputs[1])
    start = time.monotonic()
    verdict = scanner.scan(encoder, _seen(scanner, images), step.seed, reference)
    made = Artefact({"verdict": verdict.to_json()}, seconds=time.monotonic() - start)
    runner.store.save(step.stage, step.key, made)
    return made


def _reference(scanner: Any, base: Step, runner: Runner) -> MetaReference:
    key = digest([canonical(scanner, file_content), [one.key for one in base.inputs], base.seed.value])
    path = runner.store.root / "shadows" / f"{key}.safetensors"
    if path.is_file():
        return read_meta_reference(path)
    say(f"  shadow models of {scanner.name}")
    encoder, images = runner.value(base.inputs[0]).encoder, runner.value(base.inputs[1])
    work = runner.store.workspace("shadows", key)
    work.parent.mkdir(parents=True, exist_ok=True)
    needed = [encoder] if "base" in inspect.signature(scanner.train_reference).parameters else []
    seed = Seed(base.seed.value).child("shadows")
    made: MetaReference = scanner.train_reference(*needed, _seen(scanner, images), seed, checkpoint=work)
    made.write(path)
    work.unlink(missing_ok=True)
    return made


def _seen(scanner: Any, images: Dataset) -> Dataset:
    return images if "labels" in scanner.needs else images.without_labels(type(scanner).__name__)
