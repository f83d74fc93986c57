"""The true trigger and the inverted ones, encoder by encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cupel.records import Record
from cupel.report.cells import Arrays
from cupel.report.closeup import closeup
from cupel.report.gallery import in_order
from cupel.report.pictures import data_uri, is_picture, stamp_uri
from cupel.report.text import percent, plain
from cupel.report.words import encoder_label

__all__ = ["triggers_of"]

View = dict[str, Any]
_MOST = 3


def triggers_of(record: Record, arrays: Arrays) -> View | None:
    """The true trigger (None where it is not known) and, per encoder, its smallest inverted ones first.

    The smallest of each encoder comes enlarged too: see `closeup`.
    """
    true = _true(arrays)
    names = {key.split("/")[1] for key in arrays if key.startswith("inverted/")}
    encoders = []
    for name in in_order(names):
        found = _inverted(name, arrays, record.verdicts.get(name, {}))
        if found:
            under = f"inverted/{name}/{found[0]['start']}"
            close = closeup(arrays[f"{under}/mask"], arrays[f"{under}/pattern"], arrays)
            encoders.append(
                {"encoder": encoder_label(name), "found": found[:_MOST], "total": len(found), "close": close}
            )
    return {"true": true, "encoders": encoders} if true or encoders else None


def _true(arrays: Arrays) -> View | None:
    mask, pattern = arrays.get("trigger/mask"), arrays.get("trigger/pattern")
    if pattern is None:
        return None
    if mask is None or mask.ndim != 2:
        return {"uri": data_uri(pattern), "covers": ""} if is_picture(pattern) else None
    uri = stamp_uri(mask, pattern)
    return None if uri is None else {"uri": uri, "covers": _size(mask)}


def _size(mask: Any) -> str:
    size = float(np.asarray(mask, dtype=np.float64).mean())
    return percent(size) if 0 <= size <= 1 else "–"


def _inverted(name: str, arrays: Arrays, verdict: Mapping[str, Any]) -> list[View]:
    told: Sequence[Any] = verdict.get("evidence") or ()
    made = []
    parts = [key.split("/") for key in arrays]
    starts = sorted(part[2] for part in parts if part[:2] == ["inverted", name] and part[3:] == ["mask"])
    for start in starts:
        mask, pattern = arrays[f"inverted/{name}/{start}/mask"], arrays.get(f"inverted/{name}/{start}/pattern")
        if mask.ndim != 2 or pattern is None:
            continue
        uri, shade = stamp_uri(mask, pattern), np.clip(np.nan_to_num(mask.astype(np.float64)), 0, 1)
        if uri is None:
            continue
        about = told[int(start)] if start.isdecimal() and int(start) < len(told) else {}
        about = about if isinstance(about, Mapping) else {}
        size = about.get("size")
        size = float(size) if isinstance(size, int | float) and 0 <= size <= 1 else float(shade.mean())
        converged = about.get("converged")
        made.append(
            {
                "start": start,
                "uri": uri,
                "mask": data_uri(np.asarray(np.rint(255 * shade), dtype=np.uint8)),
                "size": size,
                "covers": percent(size),
                "converged": "" if converged is None else "converged" if converged else "did not converge",
                "source": plain(about.get("source", f"start {start}"), 60),
            }
        )
    return sorted(made, key=lambda one: (one["converged"] == "did not converge", one["size"]))
