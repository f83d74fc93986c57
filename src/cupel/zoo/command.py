"""`cupel zoo build` and `cupel zoo table`. Torch is imported by the command that needs it, not before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from cupel import threads
from cupel.files import write_json, write_text

__all__ = ["zoo_app", "zoo_build", "zoo_table"]


zoo_app = typer.Typer(
    help="A seeded zoo of clean and backdoored encoders, and the scanners' tables over it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Only(StrEnum):
    """Part of the work."""

    clean = "clean"
    attacked = "attacked"
    scan = "scan"
    purify = "purify"


class Form(StrEnum):
    """Output on standard output."""

    md = "md"
    json = "json"


@zoo_app.command("build")
def _build(
    zoo: Annotated[str, typer.Argument(metavar="ZOO", help="YAML file, or name of a packaged zoo.")],
    out: Annotated[Path | None, typer.Option(help="Folder for encoders and records; default zoos/NAME.")] = None,
    only: Annotated[
        Only | None, typer.Option(help="Make clean or attacked encoders alone; scan, or purify, what has been made.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Members that are worked on in this call, at most.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the members, make none.")] = False,
) -> int:
    """Make the encoders of a zoo, scan them, and try purifiers on them; run again to resume."""
    return zoo_build(zoo, out, None if only is None else only.value, limit, dry_run)


@zoo_app.command("table")
def _table(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Folders that `zoo build` wrote.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the files; default: the first.")] = None,
    form: Annotated[Form, typer.Option("--format")] = Form.md,
) -> int:
    """Tables over zoos: AUROC, rates, thresholds, cost; calibrations as files."""
    return zoo_table(folders, out, form.value)


def zoo_build(
    source: str,
    out: Path | None,
    only: Literal["clean", "attacked", "scan", "purify"] | None,
    limit: int | None,
    dry_run: bool,
) -> int:
    """`cupel zoo build`; returns the exit code: 2 where a member failed.

    Args:
        source: File, or name of a packaged zoo.
        out: Default `zoos/NAME`.
        only: `clean`, `attacked`, `scan`, `purify` or None; without it purifiers are tried where the file names any.
        limit: Members at most.
        dry_run: List the members.
    """
    from cupel.zoo.file import read_zoo
    from cupel.zoo.making import build
    from cupel.zoo.purifying import purify_members

    zoo = read_zoo(source)
    out = out or Path("zoos") / zoo.name
    if dry_run:
        for one in zoo.members:
            kind = "backdoored" if one.backdoored else "clean, fine-tuned" if one.attacked else "clean"
            print(f"{one.half:<12}{kind:<19}{one.name}")
        return 0
    threads.settle()
    parts = [] if only == "purify" else [("made", build(zoo, out, only, limit))]
    if only == "purify" or (only is None and zoo.purification is not None):
        parts.append(("purified", purify_members(zoo, out, limit)))
    for what, built in parts:
        counts = f"{built.stored} stored, {built.left} left, {len(built.failed)} failed"
        print(f"{zoo.name}: {built.done} {what}, {counts}  {out}")
        for record in built.failed:
            print(f"  {record.name}  FAILED: {record.reason or '; '.join(record.notes)}")
    return 2 if any(built.failed for _, built in parts) else 0


def zoo_table(folders: Sequence[Path], out: Path | None, form: str) -> int:
    """`cupel zoo table`: prints the tables; writes `zoo.json`, `zoo.md` and `calibration/*.json`."""
    from cupel.zoo.calibration import Calibration, write_calibrations
    from cupel.zoo.cures import read_cures, summaries
    from cupel.zoo.entries import read_entries
    from cupel.zoo.render import render_zoo
    from cupel.zoo.render_cures import render_cures
    from cupel.zoo.table import tables

    found = read_entries(folders)
    calibrations = {name: Calibration(name, found.entries) for name in found.scanners}
    made = tables(found, calibrations)
    cures, failed = read_cures(folders)
    found_cures = summaries(cures)
    text, out = render_zoo(made) + render_cures(cures, found_cures, failed), out or folders[0]
    purified = {"purifiers": [asdict(one) for one in found_cures], "purified": [asdict(one) for one in cures]}
    write_json(out / "zoo.json", {"schema": 1, "command": "zoo table", **made.to_json(), **purified})
    write_text(out / "zoo.md", text)
    written = write_calibrations(calibrations.values(), out / "calibration")
    if form == "json":
        print(json.dumps(made.to_json(), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print(text.rstrip())
        print(f"\n{out / 'zoo.json'}  {out / 'zoo.md'}  {len(written)} calibration file(s)")
    return 0
