"""How near stand-ins for triggered images came to really triggered ones: a line over the radius, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from cupel.records import Record
from cupel.report.gallery import in_order
from cupel.report.svg import nice_ticks
from cupel.report.text import figure, number_of, percent, plain
from cupel.report.words import encoder_label

__all__ = ["reach_chart", "reach_of"]

View = dict[str, Any]
_KINDS = {"clean": "right", "backdoored": "hit"}
_NAMES = {
    "clean": "clean images", "triggered": "images with the trigger", "patch": "patches, free content",
    "universal": "one L∞ perturbation for all", "inverted": "triggers that the scan inverted",
    "blends": "climbing blends",
}  # fmt: skip
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 328.0, 12.0, 156.0


def reach_of(record: Record) -> View | None:
    """A chart with a line per encoder, and a row per kind of stand-in; None where reach was not measured."""
    found = record.extra.get("reach")
    told: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    by_encoder = {
        name: kinds
        for name in in_order(told)
        if isinstance(one := told[name], Mapping) and isinstance(kinds := one.get("reach"), Mapping)
    }
    names = list(dict.fromkeys(str(kind) for kinds in by_encoder.values() for kind in kinds))
    if not names:
        return None
    lines = {name: line for name, kinds in by_encoder.items() if len(line := _line(kinds)) > 1}
    legend = [{"kind": _KINDS.get(name, "hit cured"), "label": encoder_label(name)} for name in lines]
    rows = [
        {"name": _name(kind), "cells": [_cell(kinds.get(kind)) for kinds in by_encoder.values()]} for kind in names
    ]  # fmt: skip
    encoders = [encoder_label(name) for name in by_encoder]
    return {"chart": reach_chart(lines) if lines else None, "legend": legend, "encoders": encoders, "rows": rows}


def _radius(kind: str) -> int | None:
    number = kind.removeprefix("linf-")
    return int(number) if number != kind and number.isdecimal() and len(number) < 4 else None


def _name(kind: str) -> str:
    return plain(_NAMES.get(kind, kind if _radius(kind) is None else f"L∞, {_radius(kind)}/255"), 60)


def _number(of: Any, key: str) -> float | None:
    return number_of(of.get(key)) if isinstance(of, Mapping) else None


def _cell(of: Any) -> View:
    inside = _number(of, "inside")
    return {
        "reach": figure(_number(of, "reach")),
        "centred": figure(_number(of, "centred")),
        "inside": "–" if inside is None else percent(inside),
    }


def _line(kinds: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Reach by radius in 255ths, rising; radius 0 are clean images."""
    found = [(0 if kind == "clean" else _radius(str(kind)), _number(one, "reach")) for kind, one in kinds.items()]
    return sorted((radius, value) for radius, value in found if radius is not None and value is not None)


def reach_chart(lines: Mapping[str, Sequence[tuple[int, float]]]) -> Markup:
    """Reach over the radius of the L∞ ball, a line per encoder.

    Args:
        lines: By encoder (radius in 255ths, reach), rising; one line at least, none empty.
    """
    values = [value for line in lines.values() for _, value in line]
    radii = sorted({radius for line in lines.values() for radius, _ in line})
    ticks, most = nice_ticks(min(0.0, *values), max(1.0, *values)), max(radii[-1], 1)

    def px(radius: float) -> float:
        return _LEFT + 6 + radius / most * (_RIGHT - _LEFT - 12)

    def py(value: float) -> float:
        return _BOTTOM - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (_BOTTOM - _TOP)

    said = "; ".join(
        f"{encoder_label(name)}: {figure(line[0][1])} at {line[0][0]}, {figure(line[-1][1])} at {line[-1][0]}"
        for name, line in lines.items()
    )
    label = plain(f"Reach over the radius of the L∞ ball in 255ths. {said}", 400)
    out = [Markup('<svg class="chart" viewBox="0 0 340 190" role="img" aria-label="{}">').format(label)]
    for tick in ticks:
        out.append(Markup(f'<path class="grid" d="M{_LEFT:g} {py(tick):.1f}H{_RIGHT:g}"/>'))
        out.append(Markup(f'<text class="ty" x="{_LEFT - 6:g}" y="{py(tick):.1f}">{figure(tick)}</text>'))
    free = -1.0
    for radius in radii:
        if (x := px(radius)) > free:  # names that would touch the one before are left out
            out.append(Markup(f'<text class="tx" x="{x:.1f}" y="172">{radius}</text>'))
            free = x + 17
    out.append(Markup(f'<path class="axis" d="M{_LEFT:g} {_BOTTOM:g}H{_RIGHT:g}"/>'))
    out.append(Markup('<text class="tx" x="187" y="187">radius in 255ths; 0 = clean images</text>'))
    for name, line in lines.items():
        kind, dots = _KINDS.get(name, "hit cured"), [(px(radius), py(value)) for radius, value in line]
        out.append(Markup('<polyline class="series {}" points="{}"/>').format(kind, _points(dots)))
        spots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in dots)
        out.append(Markup('<path class="spot {}" d="{}"/>').format(kind, spots))
    return Markup("").join([*out, Markup("</svg>")])


def _points(dots: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
