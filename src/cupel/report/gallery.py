"""Images with and without the trigger, references, and the maps of the embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cupel.report import svg
from cupel.report.cells import Arrays
from cupel.report.pictures import data_uri, is_batch, is_small
from cupel.report.tasks import Task
from cupel.report.text import plain
from cupel.report.words import encoder_label

__all__ = ["MOMENTS", "in_order", "maps_of", "pictures_of", "references_of"]

View = dict[str, Any]
MOMENTS = ("before the attack", "after the attack", "after purification")
ENCODERS = ("clean", "backdoored", "purified")


def in_order(names: Iterable[str]) -> list[str]:
    """Clean, backdoored, purified, then whatever else there is."""
    rank = {name: i for i, name in enumerate(ENCODERS)}
    return sorted(names, key=lambda name: (rank.get(name, len(rank)), str(name)))


def _named(label: Any, classes: Sequence[str]) -> str:
    label = int(label)
    return plain(classes[label], 40) if 0 <= label < len(classes) else f"class {label}"


def _at(arrays: Arrays, name: str, row: int) -> int | None:
    labels = arrays.get(name)
    if labels is None or labels.ndim != 1 or row >= len(labels) or not np.issubdtype(labels.dtype, np.integer):
        return None
    return int(labels[row])


def pictures_of(arrays: Arrays, classes: Sequence[str], task: Task, most: int) -> list[View]:
    """Images with and without the trigger, and what they are taken for."""
    clean, hit = arrays.get("images/clean"), arrays.get("images/triggered")
    if clean is None or not is_batch(clean):
        return []
    if hit is None or hit.shape != clean.shape or not is_batch(hit):
        hit = None
    made = []
    for row in range(min(most, len(clean))):
        label = _at(arrays, "images/labels", row)
        said = {"clean": _at(arrays, "images/predicted_clean", row)}
        said["hit"] = _at(arrays, "images/predicted_triggered", row)
        made.append(
            {
                "clean": data_uri(clean[row]),
                "hit": None if hit is None else data_uri(hit[row]),
                "pixels": is_small(clean[row]),
                "label": "" if label is None else _named(label, classes),
                "said_clean": "" if said["clean"] is None else _named(said["clean"], classes),
                "said_hit": "" if said["hit"] is None else _named(said["hit"], classes),
                "right": said["clean"] is not None and said["clean"] == label,
                "fooled": said["hit"] is not None and said["hit"] == task.target_class and said["hit"] != label,
            }
        )
    return made


def references_of(arrays: Arrays) -> list[View]:
    """The first reference images."""
    found = arrays.get("reference")
    if found is None or not is_batch(found):
        return []
    return [{"uri": data_uri(one), "pixels": is_small(one)} for one in found[:5]]


def maps_of(arrays: Arrays, classes: Sequence[str], task: Task) -> View | None:
    """The maps of the embeddings, encoder by encoder, and what their legend says; None without any."""
    parts = [key.split("/") for key in arrays]
    names = in_order({part[1] for part in parts if len(part) == 3 and part[0] == "map" and part[2] == "points"})
    made, seen = [], set()
    titles = dict(zip(ENCODERS, MOMENTS, strict=True))
    for name in names:
        group = arrays.get(f"map/{name}/group")
        if group is None or not np.issubdtype(group.dtype, np.integer):
            continue
        title = titles.get(name, encoder_label(name))
        label = f"Map of the embeddings {title}: clean images by class, triggered images and reference"
        chart = svg.scatter(
            arrays[f"map/{name}/points"], group, dict(enumerate(classes)), task.target_class, label
        )  # fmt: skip
        if chart is not None:
            made.append({"title": title[:1].upper() + title[1:], "chart": chart})
            seen |= {int(g) for g in np.unique(group)}
    kinds = {g for g in seen if g >= 0}
    legend = {
        "classes": len(kinds),
        "many": len(kinds) > svg.NAMED_CLASSES,
        "target": task.target if task.target_class in kinds else "",
        "triggered": -2 in seen,
        "reference": -1 in seen,
        "ball": -3 in seen,
        "window": -4 in seen,
    }
    return {"charts": made, **legend} if made else None
