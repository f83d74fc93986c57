"""An experiment: what a YAML file may say, and how a grid becomes cells."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from cupel.attack import ATTACKS
from cupel.encoders import ENCODERS, Architecture, Fast
from cupel.errors import SettingsError
from cupel.experiment.reading import yaml_value
from cupel.pretrain import OBJECTIVES, SimCLR
from cupel.probe import PROBES, Linear
from cupel.protocols import DataAttack, EncoderAttack, Objective, Probe, Purifier, Scanner, Trigger
from cupel.purify import PURIFIERS
from cupel.scan import SCANNERS
from cupel.settings import DataFile, OneOf, PositiveInt, parse, settings
from cupel.triggers import TRIGGERS

__all__ = [
    "Attacker",
    "Defender",
    "Downstream",
    "Experiment",
    "Paper",
    "References",
    "Shadow",
    "Upstream",
    "cells",
]


@settings
class Upstream:
    """The victim's pre-training.

    Args:
        data: Source of the images.
        size: How many; None = all.
        encoder: Architecture.
        objective: Pre-training method.
        monitor_every: Steps between looks of the k-NN monitor; 0 = none. Nothing is chosen by it.
    """

    data: str
    size: PositiveInt | None = None
    encoder: Annotated[Architecture, OneOf(ENCODERS)] = Fast()
    objective: Annotated[Objective, OneOf(OBJECTIVES)] = SimCLR()
    monitor_every: Annotated[int, Field(ge=0)] = 0


@settings
class Shadow:
    """The attacker's unlabelled images.

    Args:
        data: Source; None = the pre-training images themselves (as in BadEncoder's experiments; the record says so).
        size: How many; None = all.
    """

    data: str | None = None
    size: PositiveInt | None = None


@settings
class References:
    """The attacker's inputs of the target class.

    Args:
        file: A published reference file (`.npz`); None = drawn from the reference split of the downstream task.
        size: How many to draw.
        choose: True = the ones that a probe on the clean encoder, fitted on downstream train, takes for the target
            class most surely; False = at random.
    """

    file: DataFile | None = None
    size: PositiveInt = 1
    choose: bool = False


@settings
class Attacker:
    """What the attacker holds."""

    shadow: Shadow = Shadow()
    references: References = References()


@settings
class Downstream:
    """A later task on the frozen encoder.

    Args:
        data: Source; its train and test splits are used.
        target_class: What triggered inputs shall be taken for.
        probe: Classifier on the embeddings.
        head_seeds: Heads that are fitted; metrics are means over them.
        size, test_size: How many images; None = all.
        trigger, references: For this task, in place of the attack's and the attacker's.
        on_training_data: Fit the classifier on the victim's pre-training images with the labels they were trained with,
            poisoned ones included, instead of on the train split; for supervised pre-training, where one data set
            makes encoder and head.
    """

    data: str
    target_class: Annotated[int, Field(ge=0)]
    probe: Annotated[Probe, OneOf(PROBES)] = Linear()
    head_seeds: PositiveInt = 3
    size: PositiveInt | None = None
    test_size: PositiveInt | None = None
    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] | None = None
    references: References | None = None
    on_training_data: bool = False


@settings
class Defender:
    """What the defender holds: unlabelled images, no trigger, no target.

    Args:
        data: Source; None = images drawn from the pre-training set.
        size: How many.
    """

    data: str | None = None
    size: PositiveInt = 1000


@settings
class Paper:
    """Published numbers beside ours.

    Args:
        source: Where they stand (paper, table, page).
        results: Metric name → value in [0, 1]; with several tasks `task/metric`.
        deviations: How this experiment differs from the published one.
    """

    source: str
    results: dict[str, float] = Field(default_factory=dict)
    deviations: tuple[str, ...] = ()


@settings
class Experiment:
    """One row of a results table: an attacked encoder, its clean twin, and what scans and purifiers make of them."""

    name: str
    upstream: Upstream
    downstream: tuple[Downstream, ...]
    seed: Annotated[int, Field(ge=0)] = 0
    attacker: Attacker = Attacker()
    attack: Annotated[DataAttack | EncoderAttack, OneOf(ATTACKS)] | None = None
    defender: Defender = Defender()
    scan: tuple[Annotated[Scanner, OneOf(SCANNERS)], ...] = ()
    purify: tuple[Annotated[Purifier, OneOf(PURIFIERS)], ...] = ()
    paper: Paper | None = None


def cells(
    data: Mapping[str, Any], where: str, changes: Sequence[str] = ()
) -> tuple[tuple[dict[str, Any], Experiment], ...]:
    """Every cell of the grid as (the grid's values, experiment); one cell where there is no grid.

    Args:
        data: Content of the file.
        where: Its name, for errors.
        changes: `key=value` strings of `--set`; dotted paths, values as YAML.

    Raises:
        SettingsError: a key or value is wrong; the line says where.
    """
    plain = copy.deepcopy(dict(data))
    for change in changes:
        path, sign, text = change.partition("=")
        if not sign:
            raise SettingsError("--set", f"'{change}' has no '='", "write --set key=value")
        _put(plain, path.strip(), yaml_value(text, f"--set {path.strip()}"), "--set")
    grid = plain.pop("grid", None) or {}
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise SettingsError(f"{where}.grid", "must map dotted paths to lists", "e.g. `attack.trigger.size: [4, 6]`")
    found = []
    for values in itertools.product(*grid.values()):
        cell = copy.deepcopy(plain)
        point = dict(zip(grid, values, strict=True))
        for path, value in point.items():
            _put(cell, path, copy.deepcopy(value), f"{where}.grid")
        if isinstance(cell.get("downstream"), dict):
            cell["downstream"] = [cell["downstream"]]
        experiment = parse(Experiment, cell, where)
        if not experiment.downstream:
            raise SettingsError(f"{where}.downstream", "is empty", "name at least one task")
        found.append((point, experiment))
    return tuple(found)


def _put(plain: dict[str, Any], path: str, value: Any, where: str) -> None:
    here: Any = plain
    parts = path.split(".")
    for part in parts[:-1]:
        if isinstance(here, list) and part.isdigit() and int(part) < len(here):
            here = here[int(part)]
        elif isinstance(here, dict):
            inner = here.setdefault(part, {})
            if isinstance(inner, str):  # a bare method name gets room for settings
                inner = here[part] = {"method": inner}
            here = inner
        else:
            raise SettingsError(where, f"'{path}' leads through '{part}', which holds no keys")
    last = parts[-1]
    if isinstance(here, list) and last.isdigit() and int(last) < len(here):
        here[int(last)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise SettingsError(where, f"'{path}' leads to no key")
