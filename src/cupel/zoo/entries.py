"""The records of a zoo: what the builder writes of each member, and what tables read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cupel.errors import DataError
from cupel.files import read_json
from cupel.records import Record

__all__ = ["EFFECTIVE", "MANIFEST", "Entry", "Folders", "Scan", "read_entries", "to_entry"]

MANIFEST = "members.json"
"""File of a zoo's folder that names its members, scanners and chain."""
EFFECTIVE = 0.5
"""Attack success rate from which a backdoor counts as working (our choice)."""
_LARGE = 0.5  # a trigger on more of the image than this is no patch


@dataclass(frozen=True)
class Scan:
    """What one scanner said of one encoder, without references.

    Args:
        verdict: Verdict word.
        score: Larger = worse.
        seconds: Wall clock.
        forward, backward: Images that went through the encoder; None = not counted.
        iou, distance: Of the best inverted trigger to the true one (see `Overlap`); None = there is none.
        memory_mib: The most memory that the process held; None = not known.
    """

    verdict: str
    score: float
    seconds: float
    forward: float | None = None
    backward: float | None = None
    iou: float | None = None
    distance: float | None = None
    memory_mib: float | None = None


@dataclass(frozen=True)
class Entry:
    """One member with everything that tables need.

    Args:
        name, zoo, family: Where it comes from.
        half: `calibration` or `test`.
        hard: Reported apart.
        backdoored: The truth.
        attacked: Something was done to it after, or while, it was pre-trained.
        attack: Name of the attack; None = none.
        recipe: Identity of its pre-training without the seed, and that in words.
        pool: Architecture and data: encoders of one pool may be compared where a recipe has too few.
        architecture: Name.
        success: Attack success rate; None = clean, or not measurable.
        area: Share of the image that the trigger changes; None = clean or learned.
        scans: By scanner.
    """

    name: str
    zoo: str
    family: str
    half: str
    hard: bool
    backdoored: bool
    attacked: bool
    attack: str | None
    recipe: str
    recipe_text: str
    pool: str
    architecture: str
    success: float | None
    area: float | None
    scans: Mapping[str, Scan]

    @property
    def effective(self) -> bool:
        """Whether the backdoor works."""
        return self.backdoored and self.success is not None and self.success >= EFFECTIVE

    @property
    def stamp(self) -> bool:
        """Whether the trigger covers a part of the image."""
        return self.area is not None and self.area <= _LARGE


def to_entry(record: Record) -> Entry:
    """What a member's record says.

    Raises:
        DataError: it is no record of a zoo, or damaged.
    """
    note = record.extra.get("zoo")
    if not isinstance(note, Mapping):
        raise DataError(record.name, "is no record of a zoo", "give a folder that `cupel zoo build` wrote")
    try:
        measured = record.metrics.get("attack_success_rate")
        scans = {
            name: Scan(
                verdict=one["verdict"]["verdict"],
                score=float(one["verdict"]["score"]),
                seconds=float(one["seconds"]),
                forward=one["verdict"]["details"].get("forward_images"),
                backward=one["verdict"]["details"].get("backward_images"),
                iou=one["overlap"]["iou"] if one["overlap"] else None,
                distance=one["overlap"]["distance"] if one["overlap"] else None,
                memory_mib=one["verdict"].get("peak_memory_mib"),
            )
            for name, one in note["scans"].items()
        }
        return Entry(
            name=record.name,
            zoo=note["zoo"],
            family=note["family"],
            half=note["half"],
            hard=note["hard"],
            backdoored=note["backdoored"],
            attacked=note["attack"] is not None,
            attack=note["attack"],
            recipe=note["recipe"]["id"],
            recipe_text=note["recipe"]["text"],
            pool=f"{note['architecture']} on {note['data']}",
            architecture=note["architecture"],
            success=measured.value if measured is not None and note["backdoored"] else None,
            area=note["trigger"]["area"] if note["trigger"] else None,
            scans=scans,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(record.name, f"is a damaged record of a zoo ({error})", "build the zoo again") from error


@dataclass(frozen=True)
class Folders:
    """What stands in the folders of one or several zoos.

    Args:
        entries: Members that were built.
        failed: Records of those that could not be.
        missing: Members that have not been tried.
        scanners, chain: Names, in the order of the files.
    """

    entries: tuple[Entry, ...]
    failed: tuple[Record, ...]
    missing: int
    scanners: tuple[str, ...]
    chain: tuple[str, ...]


def read_entries(folders: Sequence[Path]) -> Folders:
    """The members of the zoos in `folders`; records of members that a zoo no longer has are left out.

    Raises:
        DataError: a folder without a zoo, or a damaged file.
    """
    entries: list[Entry] = []
    failed: list[Record] = []
    scanners: dict[str, None] = {}
    chain: dict[str, None] = {}
    missing = 0
    for folder in folders:
        if not (folder / MANIFEST).is_file():
            raise DataError(folder, "holds no zoo", "give a folder that `cupel zoo build` wrote")
        note = read_json(folder / MANIFEST)
        try:
            names, told = list(note["members"]), (list(note["scanners"]), list(note["chain"]))
        except (KeyError, TypeError) as error:
            raise DataError(folder / MANIFEST, f"is damaged ({error})", "build the zoo again") from error
        scanners |= dict.fromkeys(told[0])
        chain |= dict.fromkeys(told[1])
        for name in names:
            file = folder / "cells" / f"{name}.json"
            if not file.is_file():
                missing += 1
                continue
            record = Record.read(file)
            if record.status == "done":
                entries.append(to_entry(record))
            else:
                failed.append(record)
    return Folders(tuple(entries), tuple(failed), missing, tuple(scanners), tuple(chain))
