"""An experiment: what a YAML file may say, and how a grid becomes cells."""

from __future__ import annotations

import copy
import importlib.resources
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field
from torch import Tensor

from cupel.attack import ATTACKS
from cupel.encoders import ENCODERS, Architecture, Fast
from cupel.errors import DataError, SettingsError, did_you_mean
from cupel.pretrain import OBJECTIVES, SimCLR
from cupel.probe import PROBES, Linear
from cupel.protocols import DataAttack, EncoderAttack, Probe, Purifier, Scanner, Trigger
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
    "packaged",
    "read_experiment",
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
    objective: Annotated[SimCLR, OneOf(OBJECTIVES)] = SimCLR()
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
    """

    data: str
    target_class: Annotated[int, Field(ge=0)]
    probe: Annotated[Probe, OneOf(PROBES)] = Linear()
    head_seeds: PositiveInt = 3
    size: PositiveInt | None = None
    test_size: PositiveInt | None = None
    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] | None = None
    references: References | None = None


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


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads `1e-3` as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key.value}'", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.2: `yes` and `no` are words, `1e-3` is a number
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in rules if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$"),
    list("-+0123456789."),
)

_MAX_BYTES, _MAX_DEPTH, _MAX_VALUES = 2**20, 64, 20_000


def packaged() -> dict[str, Path]:
    """The experiments that ship with Cupel, by name."""
    root = Path(str(importlib.resources.files("cupel") / "papers"))
    return {path.stem: path for path in sorted(root.rglob("*.yaml"))}


def read_experiment(source: str | Path) -> tuple[dict[str, Any], str]:
    """The plain content of an experiment file, and its name for errors.

    Args:
        source: A path, or the name of a packaged experiment.

    Raises:
        SettingsError: not YAML, too large, too deep, duplicate keys.
        DataError: no such file.
    """
    path = Path(source)
    if not path.exists():
        known = packaged()
        if str(source) not in known:
            raise DataError(source, "no such file or packaged experiment", did_you_mean(str(source), known))
        path = known[str(source)]
    if path.is_dir():
        raise DataError(path, "is a folder", "give a YAML file")
    if path.stat().st_size > _MAX_BYTES:
        raise SettingsError(path.name, "is larger than 1 MiB", "an experiment is a page of YAML")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
        _check_extent(data)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path.name}:{mark.line + 1}:{mark.column + 1}" if mark else path.name
        raise SettingsError(where, f"is not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(path.name, f"is not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise SettingsError(path.name, "holds no mapping", "start with `name: …`")
    return data, path.name


def _check_extent(value: Any) -> None:
    """Refuse what is nested too deep, or grows too large when its aliases are followed."""
    layer, total = [value], 0
    for _ in range(_MAX_DEPTH):
        layer = [
            child
            for one in layer
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        total += len(layer)
        if total > _MAX_VALUES:
            raise RecursionError(f"holds more than {_MAX_VALUES} values")
        if not layer:
            return
    raise RecursionError(f"nested deeper than {_MAX_DEPTH}")


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
        try:
            _put(plain, path.strip(), yaml.load(text, Loader=_Loader), "--set")  # a SafeLoader
        except yaml.YAMLError:
            raise SettingsError("--set", f"the value of '{path}' is not valid YAML") from None
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
