"""Zoo files: families of clean and of backdoored encoders in two halves, of which nothing crosses."""

from __future__ import annotations

import copy
import dataclasses
import importlib.resources
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cupel.attack import ATTACKS
from cupel.errors import DataError, SettingsError, UsageError, did_you_mean
from cupel.experiment.aims import aims_of
from cupel.experiment.plan import task_names
from cupel.experiment.reading import read_experiment
from cupel.experiment.run import cell_name
from cupel.experiment.spec import Experiment, cells
from cupel.protocols import Scanner
from cupel.scan import SCANNERS
from cupel.settings import OneOf, method_name, parse, settings
from cupel.triggers import TRIGGERS
from cupel.zoo.looks import look_of
from cupel.zoo.parts import HALVES, Family, Half, Purification, Sample

__all__ = ["Member", "Zoo", "check_halves", "packaged_zoos", "read_zoo", "trigger_of"]


@settings
class _File:
    """What a zoo file may say.

    Args:
        name: As the file is called.
        base: An experiment without `name`, `seed`, `scan`, `purify` and `grid`.
        scan: Scanners that every encoder is given to.
        sample: See `Sample`.
        purify: See `Purification`.
        chain: Names of the scanners (`decree/smoke`) whose worst word counts; None = all of them.
        families: By name.
    """

    name: str
    base: dict[str, Any]
    scan: tuple[Annotated[Scanner, OneOf(SCANNERS)], ...]
    sample: Sample | None = None
    purify: Purification | None = None
    chain: tuple[str, ...] | None = None
    families: Annotated[dict[str, Any], Field(min_length=1)]


@dataclass(frozen=True)
class Member:
    """One encoder of a zoo.

    Args:
        name: A file name, unique in the zoo.
        family: Name of its family.
        half: Whether thresholds may be read off it.
        hard: See the family.
        experiment: Its making; without scanners.
    """

    name: str
    family: str
    half: Half
    hard: bool
    experiment: Experiment

    @property
    def attacked(self) -> bool:
        """Whether something was done to the pre-trained encoder, or to the images that it was trained on."""
        return self.experiment.attack is not None

    @property
    def backdoored(self) -> bool:
        """Whether it has a backdoor: fine-tuning by an attack without its trigger term leaves a clean encoder."""
        return self.attacked and getattr(self.experiment.attack, "lambda_trigger", 1.0) != 0

    @property
    def attack_name(self) -> str | None:
        """As registered."""
        return None if self.experiment.attack is None else method_name(self.experiment.attack, ATTACKS)


@dataclass(frozen=True)
class Zoo:
    """A zoo file as read.

    Args:
        name: Of the zoo.
        members: Clean ones first, the halves in turns.
        scanners: Every encoder is given to each of them.
        chain: Names of those that the default chain consists of.
        more: Scanners that the members named in `sampled` are given to, too.
        sampled: Names of members.
        purification: What purifiers are tried on, and how; None = none.
    """

    name: str
    members: tuple[Member, ...]
    scanners: tuple[Scanner, ...]
    chain: tuple[str, ...]
    more: tuple[Scanner, ...] = ()
    sampled: frozenset[str] = frozenset()
    purification: Purification | None = None

    @property
    def scanner_names(self) -> tuple[str, ...]:
        """Method and budget of each."""
        return tuple(_name_of(one) for one in (*self.scanners, *self.more))

    def scanners_of(self, member: Member) -> tuple[Scanner, ...]:
        """Those that a member is given to."""
        return (*self.scanners, *(self.more if member.name in self.sampled else ()))


def packaged_zoos() -> dict[str, Path]:
    """The zoos that ship with Cupel, by name."""
    root = Path(str(importlib.resources.files("cupel") / "zoo" / "zoos"))
    return {path.stem: path for path in sorted(root.glob("*.yaml"))}


def read_zoo(source: str | Path) -> Zoo:
    """Read a zoo file, and check that nothing of it crosses the halves.

    Args:
        source: A path, or the name of a packaged zoo.

    Raises:
        DataError: no such file.
        SettingsError: not YAML, a key or value is wrong, or the halves share a seed or the look of a trigger.
        UsageError: a trigger does not fit into the image.
    """
    known = packaged_zoos()
    if not Path(source).exists() and str(source) not in known:
        raise DataError(source, "no such file or packaged zoo", did_you_mean(str(source), known))
    plain, where = read_experiment(
        known[str(source)] if str(source) in known and not Path(source).is_file() else source
    )
    file = parse(_File, plain, where)
    if not file.scan:
        raise SettingsError(f"{where}.scan", "is empty", "name at least one scanner")
    more = () if file.sample is None else file.sample.scan
    names = [_name_of(scanner) for scanner in (*file.scan, *more)]
    each = names[: len(file.scan)]
    chain = tuple(each) if file.chain is None else file.chain
    for one in chain:
        if one not in each:
            raise SettingsError(f"{where}.chain", f"'{one}' is not among the scanners", did_you_mean(one, each))
    if len(set(names)) < len(names):
        raise SettingsError(f"{where}.scan", "names one scanner twice", "keep one of them")
    families = [_members(name, family, file.base, where) for name, family in file.families.items()]
    members = [one for family in families for one in family]
    members.sort(key=lambda one: one.backdoored)  # stable: the order of the file otherwise
    purifiers = () if file.purify is None else tuple(file.purify.methods.values())
    check_halves(members, (*file.scan, *more, *purifiers), where)
    _check_unique(members, where)
    sampled = frozenset() if file.sample is None else _spread(members, file.sample.size)
    for one in () if file.purify is None else file.purify.evidence:
        if one not in each:
            raise SettingsError(f"{where}.purify.evidence", f"'{one}' is not a scanner", did_you_mean(one, each))
    return Zoo(file.name, tuple(members), file.scan, chain, more, sampled, file.purify)


def _spread(members: Sequence[Member], size: int) -> frozenset[str]:
    """Names of up to `size` clean and `size` backdoored members of the test half, at equal distances in the file."""
    test = [one for one in members if one.half == "test" and not one.hard]
    names = []
    for kind in (False, True):
        some = [one.name for one in test if one.backdoored is kind]
        names += some if len(some) <= size else [some[i * len(some) // size] for i in range(size)]
    return frozenset(names)


def _name_of(scanner: Any) -> str:
    return str(scanner.name)


def _members(name: str, plain: Any, base: Mapping[str, Any], where: str) -> list[Member]:
    family = parse(Family, plain, f"{where}.families.{name}")
    found: dict[Half, list[Member]] = {}
    for half in HALVES:
        grid = getattr(family, half)
        if grid is None:
            continue
        place = f"{where}.families.{name}.{half}"
        # the family's own changes are an axis with one case, which comes first
        axes = {"family": {name: family.changes}, **copy.deepcopy(grid)}
        found[half] = []
        for point, experiment in cells({**base, "name": f"{name}-{half}", "grid": axes}, place):
            if len(experiment.downstream) != 1:
                raise SettingsError(place, "has several tasks", "name one, by which the backdoor is measured")
            if experiment.scan or experiment.purify:
                raise SettingsError(place, "names scanners or purifiers", "scanners stand under `scan` of the zoo")
            own = {axis: value for axis, value in point.items() if axis != "family"}
            found[half].append(Member(cell_name(experiment, own), name, half, family.hard, experiment))
    if not found:
        raise SettingsError(f"{where}.families.{name}", "has no members", "add a grid under `calibration` or `test`")
    turns = itertools.zip_longest(*found.values())
    return [one for turn in turns for one in turn if one is not None]


def _check_unique(members: Sequence[Member], where: str) -> None:
    seen: list[Experiment] = []
    names: set[str] = set()
    for member in members:
        nameless = dataclasses.replace(member.experiment, name="")
        if nameless in seen:
            raise SettingsError(f"{where}.families.{member.family}", f"{member.name} is there twice", "drop one")
        if member.name in names:
            raise SettingsError(f"{where}.families.{member.family}", f"two members are called {member.name}")
        seen.append(nameless)
        names.add(member.name)


def trigger_of(member: Member) -> Any:
    """The trigger of its goal; None where the attack learns one, or there is no backdoor."""
    if not member.backdoored:
        return None
    aim = aims_of(member.experiment, task_names(member.experiment))[0]
    return aim["trigger"] or getattr(member.experiment.attack, "trigger", None)


def check_halves(members: Sequence[Member], defences: Sequence[Any], where: str) -> None:
    """Refuse what crosses the halves: a seed (of pre-training and all else), a trigger's settings or its look.

    Args:
        members: Of both halves.
        defences: None of them may carry a stamp that looks like a trigger of the test half.
        where: Name of the file, for errors.

    Raises:
        SettingsError: the line names the two members.
    """
    seeds: dict[int, Member] = {}
    looks: dict[str, Member] = {}
    for member in members:
        _check_other_half(seeds.setdefault(member.experiment.seed, member), member, "use one seed", where)
        trigger = trigger_of(member)
        if trigger is None:
            continue
        digest = look_of(trigger, member.experiment.upstream.encoder.input_size).digest
        for key in (digest, repr(trigger)):
            _check_other_half(looks.setdefault(key, member), member, "stamp the same trigger", where)
    sizes = {member.experiment.upstream.encoder.input_size for member in members}
    for one in defences:
        for stamp, size in itertools.product(_stamps(one), sizes):
            try:
                owner = looks.get(look_of(stamp, size).digest)
            except UsageError:  # it does not fit, so it cannot be put on these images
                continue
            if owner is not None and owner.half == "test":
                name = getattr(one, "name", type(one).__name__)
                what = f"{name} carries the trigger of {owner.name}, which is in the test half"
                raise SettingsError(where, what, "give that member another trigger")


def _check_other_half(first: Member, second: Member, what: str, where: str) -> None:
    if first.half != second.half:
        what = f"{first.name} and {second.name} {what}, but are in different halves"
        raise SettingsError(f"{where}.families", what, "the halves must have nothing in common")


def _stamps(value: Any) -> Iterator[Any]:
    """Triggers anywhere inside settings."""
    if isinstance(value, tuple(TRIGGERS.values())):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _stamps(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _stamps(one)
