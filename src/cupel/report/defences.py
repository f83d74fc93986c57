"""Each scanner's verdict, and what defences took, for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cupel.records import Record
from cupel.report.gallery import in_order
from cupel.report.text import figure, number_of, plain
from cupel.report.words import VERDICTS, encoder_label

__all__ = ["costs_of", "scanners_of"]

View = dict[str, Any]


def scanners_of(record: Record) -> list[View]:
    """One row per encoder and scanner, where an encoder was looked at by several; their worst verdict is the scan's."""
    rows = []
    by_encoder = _mappings(record.extra.get("scans"))
    for name in in_order(by_encoder):
        each = _mappings(by_encoder[name])
        for scanner, said in each.items() if len(each) > 1 else ():
            word = str(said.get("verdict", ""))
            details = said.get("details")
            counts = details if isinstance(details, Mapping) else {}
            rows.append(
                {
                    "encoder": encoder_label(name),
                    "scanner": plain(scanner, 60),
                    "word": word if word in VERDICTS else "unknown",
                    "label": VERDICTS.get(word, (plain(word, 40) or "Unknown", ""))[0],
                    "score": figure(said.get("score")),
                    "threshold": figure(said.get("threshold")),
                    "tested": plain(said.get("tested", ""), 200),
                    **_cost({**counts, "peak_memory_mib": said.get("peak_memory_mib")}),
                }
            )
    return rows


def costs_of(record: Record) -> list[View]:
    """One row per purifier and filter: images it was given, images through the encoder, memory."""
    rows = []
    for name, cost in _mappings(record.extra.get("defences")).items():
        kind, _, method = name.partition(" ")
        rows.append({"kind": plain(kind, 20), "method": plain(method, 60), "images": _whole(cost), **_cost(cost)})
    return rows


def _mappings(value: Any) -> dict[str, Mapping[str, Any]]:
    return {str(k): v for k, v in value.items() if isinstance(v, Mapping)} if isinstance(value, Mapping) else {}


def _cost(of: Mapping[str, Any]) -> View:
    memory = number_of(of.get("peak_memory_mib"))
    return {
        "forward": _whole(of, "forward_images"),
        "backward": _whole(of, "backward_images"),
        "memory": "–" if memory is None else f"{memory:.0f} MiB",
    }


def _whole(of: Mapping[str, Any], key: str = "images") -> str:
    number = number_of(of.get(key))
    return "–" if number is None else f"{number:,.0f}".replace(",", "\u202f")
