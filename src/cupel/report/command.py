"""What `cupel report` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cupel.errors import DataError
from cupel.files import write_text
from cupel.report.cells import load_cells
from cupel.report.html import write_report
from cupel.report.table import render_table

__all__ = ["report_command"]


def report_command(folders: Sequence[Path], out: Path | None, form: str) -> int:
    """Write the page, or print (or write) a table; returns the exit code."""
    cells = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(folder, "no such folder", "give a folder that `cupel run`, `demo` or `scan` wrote")
        cells += load_cells(folder)
    if form == "html":
        target = out or folders[0] / "report.html"
        write_report(cells, target, title=", ".join(folder.name for folder in folders))
        print(target)
        return 0
    table = render_table([record for record, _ in cells], form)
    if out is None:
        print(table.rstrip())
    else:
        write_text(out, table)
        print(out)
    return 0
