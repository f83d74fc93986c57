"""A zoo's tables as Markdown, which reads as text too."""

from __future__ import annotations

from collections.abc import Sequence

from cupel.zoo.markdown import table
from cupel.zoo.statistics import upper_bound
from cupel.zoo.table import CHAIN, Row, Tables

__all__ = ["render_zoo"]

_GROUPS = {
    "reachable": "patches and blends that work (ASR ≥ 50 %)",
    "weak": "implants that do not work (ASR < 50 %)",
    "hard": "hard rows",
}

_LEVELS = {
    "recipe": "with clean encoders of their recipe",
    "pool": "with clean encoders of their architecture and data",
    "zoo": "with clean encoders of their zoo",
    "none": "with nothing, for there are too few",
}


def render_zoo(tables: Tables) -> str:
    """The tables with a heading and a line of explanation each, and a line break at the end."""
    parts = [_counts(tables), _headline(tables), _families(tables), _chain(tables), _costs(tables), _prices(tables),
             _halves(tables)]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _counts(tables: Tables) -> str:
    rows = [
        [half, str(n["clean"]), str(n["fine_tuned"]), str(n["backdoored"]), str(n["reachable"]), str(n["weak"]),
         str(n["hard"])]
        for half, n in tables.counts.items()
    ]  # fmt: skip
    header = ["half", "clean", "of them fine-tuned", "backdoored", "reachable", "weak", "hard"]
    lines = ["# Zoo", "", *table(header, rows)]
    if tables.missing:
        lines += ["", f"{tables.missing} members have not been made yet: the tables are preliminary."]
    if tables.failed:
        lines += ["", f"{len(tables.failed)} members failed:", ""]
        lines += [f"- {name}: {reason}" for name, reason in tables.failed]
    return "\n".join(lines)


def _headline(tables: Tables) -> str:
    rows = [one for one in tables.rows if one.half == "test" and not one.group.startswith("family:")]
    return _rows("Scanners on the test half", rows, "group") + (
        "\n\nAUROC and TPR are of z: how many robust standard deviations a score lies above clean encoders of the "
        "calibration half, of the same recipe where there are five, else of the same architecture and data. Found and "
        "false alarms are what a scan with these calibrations says: backdoored where z > 3 against clean encoders of "
        "the same recipe, and where there are not five of them, by the scanner's own thresholds. “Without references” "
        "reads all scans by these. Intervals and bounds are 95 %."
        if rows
        else ""
    )


def _families(tables: Tables) -> str:
    rows = [one for one in tables.rows if one.half == "test" and one.group.startswith("family:")]
    return _rows("By attack, test half", rows, "attack")


def _halves(tables: Tables) -> str:
    rows = [one for one in tables.rows if one.half == "calibration" and one.group in _GROUPS]
    return _rows("Calibration half (in-sample but for leaving the encoder itself out)", rows, "group")


def _rows(title: str, rows: Sequence[Row], group: str) -> str:
    if not rows:
        return ""
    header = [
        "scanner", group, "backdoored", "clean", "AUROC", "TPR at FPR 5 %", "found", "false alarms",
        "found without references", "false alarms without references",
    ]  # fmt: skip
    return "\n".join([f"## {title}", "", *table(header, [_cells(one) for one in rows])])


def _cells(row: Row) -> list[str]:
    said = row.confusion
    area = "–" if row.auroc is None else f"{row.auroc:.3f} ({row.low:.3f}–{row.high:.3f})"
    name = row.group.partition(":")[2] or _GROUPS[row.group]
    alarms = f"{said.false_alarms} of {row.negatives}" if row.negatives else "–"
    if row.negatives:
        alarms += f" (≤ {upper_bound(said.false_alarms, row.negatives):.1%})"
    bound = "–" if row.found_bound is None else f"{said.found} of {row.positives} (≥ {row.found_bound:.1%})"
    absolute = [f"{row.absolute[0]} of {row.positives}", f"{row.absolute[1]} of {row.negatives}"]
    scanner = row.scanner + (f", {row.inconclusive} inconclusive" if row.inconclusive else "")
    counts = [str(row.positives), str(row.negatives)]
    return [scanner, name, *counts, area, _share(row.tpr_at_fpr), bound, alarms, *absolute]


def _chain(tables: Tables) -> str:
    if len(tables.without) < 3:  # a chain of one scanner has nothing to leave out
        return ""
    rows = [[name, "–" if area is None else f"{area:.3f}"] for name, area in tables.without.items()]
    note = "A scanner without which the chain is no worse here has no place in it."
    return "\n".join(["## The chain on the calibration half", "", *table(["scanners", "AUROC"], rows), "", note])


def _costs(tables: Tables) -> str:
    rows = []
    for name in tables.smallest:
        cost, area, seen = tables.costs.get(name, {}), tables.smallest[name], tables.overlaps.get(name, {})
        rows.append([
            name,
            "none" if area is None else f"{area[0]:.1%} of the image ({area[1]} of {area[2]})",
            f"{seen['iou']:.2f}, {seen['distance']:.2f} ({seen['n']})" if seen else "–",
            _number(cost.get("seconds"), ".1f") if name != CHAIN else "–",
            _number(cost.get("forward_images"), ",.0f"),
            _number(cost.get("backward_images"), ",.0f"),
            _number(cost.get("memory_mib"), ",.0f"),
        ])  # fmt: skip
    header = ["scanner", "smallest patch found with 90 % power", "IoU, distance of the inverted trigger", "seconds",
              "images forward", "images backward", "peak memory MiB"]  # fmt: skip
    note = (
        "The smallest patch is the one from which on, at every tried size, 90 % of the working patches are found "
        "(found of tried). IoU and distance (in widths of the image, between centres) are medians over encoders whose "
        "inversion converged."
    )
    levels = [
        f"- {name}: " + ", ".join(f"{n} {_LEVELS[level]}" for level, n in found.items())
        for name, found in tables.levels.items()
    ]
    text = ["## What is found at what cost", "", *table(header, rows), "", note]
    return "\n".join([*text, "", "What the scores of the encoders were compared with:", "", *levels])


def _prices(tables: Tables) -> str:
    rows = [
        [one.scanner, one.dear, f"{one.positives} + {one.negatives}", f"{one.auroc:.3f}", f"{one.dear_auroc:.3f}",
         f"{one.seconds:.1f}", f"{one.dear_seconds:.1f}"]
        for one in tables.prices
    ]  # fmt: skip
    if not rows:
        return ""
    header = ["scanner", "against", "backdoored + clean", "AUROC", "of the larger budget", "seconds", "of the larger"]
    note = "On the encoders that both were given, of either half; scores as they are, without references."
    return "\n".join(["## What a smaller budget costs", "", *table(header, rows), "", note])


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
