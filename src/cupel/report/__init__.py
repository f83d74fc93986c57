"""One static, offline page from records, and the same numbers as text, Markdown, CSV or LaTeX. Needs no torch."""

from __future__ import annotations

from cupel.report.cells import Arrays, Cell, load_cells
from cupel.report.html import render_report, write_report
from cupel.report.table import FORMATS, render_table

__all__ = ["FORMATS", "Arrays", "Cell", "load_cells", "render_report", "render_table", "write_report"]
