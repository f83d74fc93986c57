"""How far inversions came with masks of each area: the concentration that a stamp of a given size can reach."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from cupel.records import Record
from cupel.report.cells import Arrays
from cupel.report.gallery import in_order
from cupel.report.text import figure, number_of, plain
from cupel.report.words import encoder_label

__all__ = ["envelope", "path_chart", "paths_of"]

View = dict[str, Any]
Floats = NDArray[np.float64]
Paths = Sequence[tuple[Floats, Floats]]
_AXES = {"linf": "largest change of a pixel, % of the range", "frequency": "strength of the colours, %"}
_AREA = "mask area, % of the image (at most)"
_SIZES = (*(m * 10.0**e for e in range(-5, 0) for m in (1, 2, 5)), 1.0)
_REACHES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 328.0, 14.0, 172.0


def envelope(path: NDArray[Any]) -> tuple[Floats, Floats] | None:
    """Sizes, rising, and the largest reach of anything up to each of them; only where that grows.

    Args:
        path: `[steps, 2]`, size and reach.

    Returns:
        None where the shape is another one or nothing is finite with a size above 0.

    Example:
        >>> sizes, reaches = envelope(np.array([[0.4, 0.9], [0.2, 0.95], [0.1, 0.7]]))
        >>> sizes.tolist(), reaches.tolist()
        ([0.1, 0.2], [0.7, 0.95])
    """
    if path.dtype.kind not in "fiu" or path.ndim != 2 or path.shape[1] != 2:
        return None
    walked = path.astype(np.float64)
    walked = walked[np.isfinite(walked).all(axis=1) & (walked[:, 0] > 0) & (walked[:, 0] <= 1)]
    if not len(walked):
        return None
    walked = walked[np.lexsort((-walked[:, 1], walked[:, 0]))]
    best = np.maximum.accumulate(walked[:, 1])
    grows = np.flatnonzero(np.diff(best, prepend=-np.inf) > 0)
    return walked[grows, 0], best[grows]


def paths_of(record: Record, arrays: Arrays) -> list[View]:
    """Per scanner whose inversions were recorded, a chart per encoder; those of one scanner have the same axes."""
    found: dict[str, dict[str, dict[str, tuple[Floats, Floats]]]] = {}
    goals: dict[str, float] = {}
    for encoder, said, under in _told(record):
        told = said.get("evidence")
        goal = number_of(details.get("goal")) if isinstance(details := said.get("details"), Mapping) else None
        for i, one in enumerate(told if isinstance(told, list | tuple) else ()):
            source = plain(one.get("source", "") if isinstance(one, Mapping) else "", 80)
            scanner = source.rpartition(" start ")[0] or source
            curves = found.setdefault(scanner, {})  # in the order in which scanners are told
            if goal is not None:
                goals.setdefault(scanner, goal)
            stored = arrays.get(f"{under}/{i}/path")
            if stored is not None and (curve := envelope(stored)) is not None:
                curves.setdefault(encoder, {}).setdefault(source, curve)
    return [
        {"scanner": scanner, "charts": _charts(scanner, by_encoder, goals.get(scanner))}
        for scanner, by_encoder in found.items()
        if by_encoder
    ]


def _told(record: Record) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Encoder, verdict and where its arrays lie: each scanner's own verdict first, whose details are surely its own."""
    scans = record.extra.get("scans")
    for encoder in in_order(record.verdicts):
        each = scans.get(encoder) if isinstance(scans, Mapping) else None
        for name, said in each.items() if isinstance(each, Mapping) else ():
            if isinstance(said, Mapping):
                yield encoder, said, f"scans/{encoder}/{name}"
        yield encoder, record.verdicts[encoder], f"inverted/{encoder}"


def _charts(scanner: str, by_encoder: Mapping[str, Mapping[str, Any]], goal: float | None) -> list[View]:
    kind = scanner.partition("/")[2].partition("-")[0]
    every = [curve for curves in by_encoder.values() for curve in curves.values()]
    return [
        {
            "title": encoder_label(encoder),
            "chart": path_chart(list(curves.values()), goal, _AXES.get(kind, _AREA), encoder_label(encoder), every),
        }
        for encoder, curves in by_encoder.items()
    ]


def path_chart(curves: Paths, goal: float | None, axis: str, name: str, shared: Paths | None = None) -> Markup:
    """A stepped line per start: largest reach over the size, which is on a logarithmic scale; reach is stretched to 1.

    Args:
        curves: As `envelope` gives them, at least one.
        goal: Dashed line; None = none.
        axis: What the size is.
        name: The encoder, for those who do not see the chart.
        shared: Curves that the axes must span, for charts to compare; None = `curves`.
    """
    spanned = curves if shared is None else shared
    sizes = np.concatenate([size for size, _ in spanned])
    low = max((s for s in _SIZES[:-1] if s <= sizes.min() * (1 + 1e-9)), default=_SIZES[0])
    high = min((s for s in _SIZES if s >= sizes.max() * (1 - 1e-9) and s > low), default=1.0)
    first = _stretched(min(float(reach[0]) for _, reach in spanned))
    last = max(_stretched(float(reach[-1])) for _, reach in spanned)
    wanted = [_stretched(goal)] if goal is not None else []
    bottom = max((s for s in map(_stretched, _REACHES) if s <= min([first, *wanted])), default=0.0)
    top = min((s for s in map(_stretched, _REACHES) if s >= max([last, *wanted]) and s > bottom), default=4.0)

    def px(size: float) -> float:
        share = math.log(max(size, low) / low) / math.log(high / low)
        return _LEFT + min(share, 1.0) * (_RIGHT - _LEFT)

    def py(reach: float) -> float:
        return _BOTTOM - (_stretched(reach) - bottom) / (top - bottom) * (_BOTTOM - _TOP)

    out = [
        Markup('<svg class="chart" viewBox="0 0 340 208" role="img" aria-label="{}">').format(
            _label(curves, goal, name)
        )
    ]
    out += [*_grid(px, py, (low, high), (bottom, top))]
    out.append(Markup('<text class="tx" x="190" y="204">{}</text>').format(plain(axis, 60)))
    for size, reach in curves:
        line = f"M{px(size[0]):.1f} {py(reach[0]):.1f}"
        at = ""
        for s, r in zip(size[1:], reach[1:], strict=True):
            step = f"H{px(s):.1f}V{py(r):.1f}"
            line, at = (line, at) if step == at else (line + step, step)
        out.append(Markup(f'<path class="start" d="{line}H{_RIGHT:g}"/>'))
    if goal is not None:
        said = f"goal {escape(figure(goal))}"  # on the left: there the lines are low
        out.append(Markup(f'<path class="limit" d="M{_LEFT:g} {py(goal):.1f}H{_RIGHT:g}"/>'))
        out.append(Markup(f'<text class="where" x="{_LEFT + 32:g}" y="{py(goal) - 8:.1f}">{said}</text>'))
    return Markup("").join([*out, Markup("</svg>")])


def _stretched(reach: float) -> float:
    """−log10(1 − reach), at least 0 and at most 4: 0.9, 0.99 and 0.999 lie equally far apart."""
    return -math.log10(1 - min(max(reach, 0.0), 0.9999))


def _grid(px: Any, py: Any, sizes: tuple[float, float], reaches: tuple[float, float]) -> Iterator[Markup]:
    """Lines and names of both axes; names that would touch the one before are left out."""
    free = math.inf
    for reach in _REACHES:
        if reaches[0] - 1e-9 <= _stretched(reach) <= reaches[1] + 1e-9 and (y := py(reach)) < free:
            yield Markup(f'<path class="grid" d="M{_LEFT:g} {y:.1f}H{_RIGHT:g}"/>')
            yield Markup(f'<text class="ty" x="{_LEFT - 6:g}" y="{y:.1f}">{reach:g}</text>')
            free = y - 13
    yield Markup(f'<path class="axis" d="M{_LEFT:g} {_BOTTOM:g}H{_RIGHT:g}"/>')
    free = -math.inf
    for size in _SIZES:
        if sizes[0] * (1 - 1e-9) <= size <= sizes[1] * (1 + 1e-9) and (x := px(size)) > free:
            yield Markup(f'<path class="axis" d="M{x:.1f} {_BOTTOM:g}v4"/>')
            yield Markup(f'<text class="tx" x="{x:.1f}" y="188">{100 * size:g}</text>')
            free = x + 22


def _label(curves: Paths, goal: float | None, name: str) -> str:
    """What the chart shows, in words."""
    said = f"{name}: largest concentration over the size of the trigger, {len(curves)} starts"
    if goal is not None:
        least = [float(size[reach > goal][0]) for size, reach in curves if (reach > goal).any()]
        said += f"; {figure(goal)} is reached " + (f"from size {figure(min(least))} on" if least else "by none")
    return plain(said, 400)
