"""The numbers of many records as one table: text, Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence

from cupel.errors import UsageError, did_you_mean
from cupel.records import Metric, Record
from cupel.report.tasks import tasks_of
from cupel.report.text import interval, percent, plain, points
from cupel.report.words import METRICS, distortion_of, metric_word

__all__ = ["FORMATS", "render_table"]

_SHOWN = tuple(name for name in METRICS if not name.startswith("robust"))
_SCANNED = ("clean", "backdoored", "purified")
Row = list[str]


def render_table(records: Sequence[Record], format: str = "text") -> str:
    """One row per record and downstream task.

    Args:
        records: In the order shown.
        format: `text`, `md` and `latex` show percentages with intervals; `csv` has everything as fractions in full
            precision, each metric with its ends, samples and seeds. A metric that could not be measured reads
            "not measurable", in CSV it is an empty value beside `n` = 0; one that was not measured is "–", or empty.

    Returns:
        The table with a line break at its end.

    Raises:
        UsageError: no such format.
    """
    if format not in FORMATS:
        raise UsageError("format", f"unknown '{plain(format, 40)}'", did_you_mean(format, FORMATS))
    return FORMATS[format](records)


def _shown(records: Sequence[Record]) -> tuple[Row, list[Row], list[bool]]:
    """Header, rows, and which columns are numbers. Columns that are empty throughout are left out."""
    found = [(record, task) for record in records for task in tasks_of(record, [])]
    named = [name for name in _SHOWN if any(name in task.metrics for _, task in found)]
    others = dict.fromkeys(name for _, task in found for name in task.metrics if _survives(name) or _is_twin(name))
    named += [name for name in others if name not in named]
    scanned = [which for which in _SCANNED if any(which in record.verdicts for record in records)]
    tasks = any(task.name for _, task in found)
    status = any(record.status != "done" for record in records)
    header = ["name", *(["task"] if tasks else []), "seed", *(["status"] if status else [])]
    for name in named:
        header += [f"{metric_word(name).short} %", *([f"{metric_word(name).short} − CA"] if _is_twin(name) else [])]
    header += [f"scan: {which}" for which in scanned]
    rows = []
    for record, task in found:
        row = [plain(record.name, 120), *([task.name] if tasks else []), str(record.seed)]
        row += [plain(record.status, 20)] if status else []
        for name in named:
            metric = task.metrics.get(name)
            row += [_cell(metric), *([_cost(metric, task.metrics.get("clean_accuracy"))] if _is_twin(name) else [])]
        row += [plain(record.verdicts.get(which, {}).get("verdict", "–"), 20) for which in scanned]
        rows.append(row)
    left = 1 + tasks
    numbers = [left <= i < len(header) - len(scanned) and header[i] != "status" for i in range(len(header))]
    return header, rows, numbers


def _survives(name: str) -> bool:
    """Whether it is the attack's success under a distortion."""
    split = distortion_of(name)
    return split is not None and split[0] == "attack_success_rate"


def _is_twin(name: str) -> bool:
    """Whether it is the accuracy of the clean twin after purification."""
    return re.fullmatch(r"clean_purified(_\d+)?_accuracy", name) is not None


def _cost(purified: Metric | None, clean: Metric | None) -> str:
    """What purification made of the clean twin's accuracy."""
    if purified is None or clean is None or purified.value is None or clean.value is None:
        return "–"
    return points(purified.value - clean.value)


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return "–"
    ends = interval(metric.low, metric.high, unit=False)
    return percent(metric.value, unit=False) + (f" ({ends})" if ends else "")


def _text(records: Sequence[Record]) -> str:
    header, rows, numbers = _shown(records)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in [header, *rows]
    ]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines) + "\n"


def _markdown(records: Sequence[Record]) -> str:
    header, rows, numbers = _shown(records)
    rule = ["---:" if number else "---" for number in numbers]
    lines = [[_md(cell) for cell in header], rule, *([_md(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _md(cell: str) -> str:
    cell = cell.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\|`*_[]!#" else c for c in cell)


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "\u202f": r"\,",
    "<": r"\textless{}", ">": r"\textgreater{}", "“": "``", "”": "''", "…": r"\dots{}",
}  # fmt: skip


def _latex(records: Sequence[Record]) -> str:
    header, rows, numbers = _shown(records)
    columns = "".join("r" if number else "l" for number in numbers)
    body = [" & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in row) + r" \\" for row in [header, *rows]]
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        body[0],
        r"\midrule",
        *body[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _csv(records: Sequence[Record]) -> str:
    found = [(record, task) for record in records for task in tasks_of(record, [])]
    named = list(dict.fromkeys(name for _, task in found for name in task.metrics))
    ends = ("", "_low", "_high", "_n", "_seeds")
    header = ["name", "task", "seed", "status", "cupel", "device", "threads"]
    header += [f"verdict_{which}" for which in _SCANNED] + [name + end for name in named for end in ends]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([_quoted(cell) for cell in header])
    for record, task in found:
        row = [record.name, task.name, record.seed, record.status, record.cupel, record.device, record.threads]
        row += [record.verdicts.get(which, {}).get("verdict", "") for which in _SCANNED]
        for name in named:
            m = task.metrics.get(name)
            row += [""] * 5 if m is None else ["" if v is None else v for v in (m.value, m.low, m.high, m.n, m.seeds)]
        writer.writerow([cell if isinstance(cell, int | float) else _quoted(cell) for cell in row])
    return stream.getvalue()


def _quoted(cell: object) -> str:
    """A cell that no spreadsheet takes for a formula: an apostrophe stands before = + - @."""
    text = plain(cell, 300)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


FORMATS: Mapping[str, Callable[[Sequence[Record]], str]] = {
    "text": _text, "md": _markdown, "csv": _csv, "latex": _latex
}  # fmt: skip
"""Renderer by name."""
