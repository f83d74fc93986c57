"""An experiment: what a YAML file may say, and how a grid becomes cells."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from cupel.attack import ATTACKS
from cupel.certify import CERTIFIERS
from cupel.errors import SettingsError, did_you_mean
from cupel.experiment.parts import Attacker, Defender, Downstream, Paper, Upstream
from cupel.experiment.reading import yaml_value
from cupel.protocols import Certifier, DataAttack, EncoderAttack, Filter, Purifier, Scanner
from cupel.purify import PURIFIERS
from cupel.purify.reach import Reach
from cupel.scan import FILTERS, SCANNERS
from cupel.settings import OneOf, parse, settings

__all__ = ["Experiment", "cells"]


@settings
class Experiment:
    """One row of a results table: an attacked encoder, its clean twin, and what defences make of them.

    Args:
        filter: Clean a poisoned training set; encoders are trained anew on what is left.
        scan, purify: Of encoders. Purifiers are handed what the scans of the attacked encoder inverted.
        purify_clean: Purify the clean twin as well, with what the scans of it inverted; it is not scanned again.
        certify: Classifiers of the first task whose answer no patch of some size can change.
        reach: How near stand-ins for triggered images come to really triggered ones; None = not measured.
    """

    name: str
    upstream: Upstream
    downstream: tuple[Downstream, ...]
    seed: Annotated[int, Field(ge=0)] = 0
    attacker: Attacker = Attacker()
    attack: Annotated[DataAttack | EncoderAttack, OneOf(ATTACKS)] | None = None
    defender: Defender = Defender()
    scan: tuple[Annotated[Scanner, OneOf(SCANNERS)], ...] = ()
    filter: tuple[Annotated[Filter, OneOf(FILTERS)], ...] = ()
    purify: tuple[Annotated[Purifier, OneOf(PURIFIERS)], ...] = ()
    purify_clean: bool = False
    certify: tuple[Annotated[Certifier, OneOf(CERTIFIERS)], ...] = ()
    reach: Reach | None = None
    paper: Paper | None = None


def cells(
    data: Mapping[str, Any], where: str, changes: Sequence[str] = ()
) -> tuple[tuple[dict[str, Any], Experiment], ...]:
    """Every cell of the grid as (the grid's values, experiment); one cell where there is no grid.

    An axis of the grid is a dotted path with a list of values, or a name of its own with named cases, each a mapping of
    dotted paths to values: `"loss terms": {all: {}, "no L2": {attack.lambda_utility: 0.0}}`. Beside the grid may stand
    `scales`: for each name (`gpu`, `paper`) a mapping of dotted paths, which `--set scale=gpu` applies before all other
    changes; the experiment is then called by its name and the scale.

    Args:
        data: Content of the file.
        where: Its name, for errors.
        changes: `key=value` strings of `--set`; dotted paths, values as YAML.

    Raises:
        SettingsError: a key or value is wrong; the line says where.

    Example:
        >>> plain = {"name": "a", "upstream": {"data": "digits"}, "downstream": {"data": "digits", "target_class": 1}}
        >>> [point for point, _ in cells({**plain, "grid": {"seed": [0, 1]}}, "a.yaml")]
        [{'seed': 0}, {'seed': 1}]
        >>> scaled = {**plain, "scales": {"gpu": {"upstream.size": 500}}}
        >>> [(e.name, e.upstream.size) for _, e in cells(scaled, "a.yaml", ["scale=gpu"])]
        [('a-gpu', 500)]
    """
    plain = copy.deepcopy(dict(data))
    pairs = [_pair(change) for change in changes]
    _scale(plain, [value for path, value in pairs if path == "scale"], where)
    for path, value in pairs:
        if path != "scale":
            _put(plain, path, value, "--set")
    axes = _axes(plain.pop("grid", None) or {}, f"{where}.grid")
    found = []
    for chosen in itertools.product(*axes.values()):
        cell = copy.deepcopy(plain)
        for _, puts in chosen:
            for path, value in puts.items():
                _put(cell, path, copy.deepcopy(value), f"{where}.grid")
        if isinstance(cell.get("downstream"), dict):
            cell["downstream"] = [cell["downstream"]]
        experiment = parse(Experiment, cell, where)
        if not experiment.downstream:
            raise SettingsError(f"{where}.downstream", "is empty", "name at least one task")
        found.append(({axis: shown for axis, (shown, _) in zip(axes, chosen, strict=True)}, experiment))
    return tuple(found)


def _pair(change: str) -> tuple[str, Any]:
    path, sign, text = change.partition("=")
    if not sign:
        raise SettingsError("--set", f"'{change}' has no '='", "write --set key=value")
    return path.strip(), yaml_value(text, f"--set {path.strip()}")


def _scale(plain: dict[str, Any], wanted: Sequence[Any], where: str) -> None:
    """Apply what the file says of the wanted scale; the file as it stands is the scale `cpu`."""
    scales = plain.pop("scales", None) or {}
    if not isinstance(scales, dict) or not all(isinstance(one, dict) for one in scales.values()):
        raise SettingsError(f"{where}.scales", "must map names to mappings", "e.g. `gpu: {attack.steps: 5000}`")
    for scale in wanted:
        if scale not in ("cpu", *scales):
            raise SettingsError("--set scale", f"unknown scale '{scale}'", did_you_mean(str(scale), ["cpu", *scales]))
        for path, value in scales.get(scale, {}).items():
            _put(plain, str(path), copy.deepcopy(value), f"{where}.scales.{scale}")
        if scale != "cpu":
            plain["name"] = f"{plain.get('name')}-{scale}"


def _axes(grid: Any, where: str) -> dict[str, list[tuple[Any, dict[str, Any]]]]:
    """By axis, each of its values as it is shown and what it puts where."""
    if not isinstance(grid, dict):
        raise SettingsError(where, "must map dotted paths to lists", "e.g. `attack.trigger.size: [4, 6]`")
    made: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
    for axis, values in grid.items():
        if isinstance(values, list) and values:
            made[str(axis)] = [(value, {str(axis): value}) for value in values]
        elif isinstance(values, dict) and values and all(isinstance(one, dict) for one in values.values()):
            made[str(axis)] = [(str(name), {str(k): v for k, v in puts.items()}) for name, puts in values.items()]
        else:
            todo = "e.g. `attack.trigger.size: [4, 6]`, or named cases that are mappings of dotted paths"
            raise SettingsError(f"{where}.{axis}", "must be a list, or a mapping of named cases", todo)
    return made


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
