"""Charts as inline SVG: no script, no style attribute; colours come from classes of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from cupel.report.text import plain

__all__ = ["NAMED_CLASSES", "line_chart", "meter", "nice_ticks", "scatter", "thinned"]

NAMED_CLASSES = 10
"""Up to so many classes get a colour and a name each; more are grey, and only the target class stands out."""
_MOST_POINTS = 2500
Floats = NDArray[np.float64]


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that span [low, high].

    Example:
        >>> nice_ticks(0.03, 0.97)
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if not high > low:
        pad = abs(low) / 10 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = size * next(f for f in (1, 2, 2.5, 5, 10) if f * size >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thinned(x: Floats, y: Floats, most: int = 320) -> tuple[Floats, Floats]:
    """At most about `most` points: of each bundle its smallest and its largest value, so that no spike is lost."""
    if len(y) <= most:
        return x, y
    kept = [0, len(y) - 1]
    for rows in np.array_split(np.arange(len(y)), most // 2):
        kept += [int(rows[np.argmin(y[rows])]), int(rows[np.argmax(y[rows])])]
    rows = np.unique(kept)
    return x[rows], y[rows]


def _floats(a: NDArray[Any]) -> Floats:
    """As float64; what holds no numbers is empty."""
    return a.astype(np.float64) if a.dtype.kind in "biuf" else np.empty(0)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def line_chart(values: NDArray[Any], steps: NDArray[Any] | None, label: str) -> Markup | None:
    """One curve with axes.

    Args:
        values: `[t]`; those that are not finite leave a gap.
        steps: `[t]`, or None = 1, 2, ….
        label: What is shown, for those who do not see it.

    Returns:
        None where fewer than two finite values exist.
    """
    y = _floats(values).ravel()
    x = np.arange(1.0, len(y) + 1) if steps is None else _floats(steps).ravel()
    if len(x) != len(y):
        x = np.arange(1.0, len(y) + 1)
    good = np.isfinite(y) & np.isfinite(x)
    if good.sum() < 2:
        return None
    width, height, left, right, top, bottom = 340.0, 190.0, 46.0, 12.0, 12.0, 34.0
    yt = nice_ticks(float(y[good].min()), float(y[good].max()))
    x0, x1 = float(x[good].min()), float(x[good].max())
    xt = [t for t in nice_ticks(x0, x1) if x0 <= t <= x1] or [x0]

    def px(v: Any) -> Any:
        return left + (v - x0) / ((x1 - x0) or 1.0) * (width - left - right)

    def py(v: Any) -> Any:
        return height - bottom - (v - yt[0]) / (yt[-1] - yt[0]) * (height - top - bottom)

    out = [Markup('<svg class="chart" viewBox="0 0 340 190" role="img" aria-label="{}">').format(plain(label))]
    for t in yt:
        h = _n(py(t))
        out.append(Markup(f'<path class="grid" d="M46 {h}H328"/><text class="ty" x="40" y="{h}">{_tick(t)}</text>'))
    for t in xt:
        out.append(Markup(f'<text class="tx" x="{_n(px(t))}" y="172">{_tick(t)}</text>'))
    out.append(Markup('<path class="axis" d="M46 156H328"/><text class="tx" x="187" y="187">step</text>'))
    for run in np.split(np.arange(len(y)), np.flatnonzero(np.diff(good.astype(int))) + 1):
        if good[run[0]]:
            xs, ys = thinned(x[run], y[run])
            dots = " ".join(f"{_n(a)},{_n(b)}" for a, b in zip(px(xs), py(ys), strict=True))
            out.append(Markup(f'<polyline class="curve" points="{dots}"/>'))
    return Markup("").join([*out, Markup("</svg>")])


def meter(value: float, low: float | None, high: float | None) -> Markup:
    """A bar from 0 to 100 % with the interval across its end. It repeats a number, so it is hidden from readers."""
    bar = f'<rect class="fill" width="{100 * value:.1f}" height="8"/>'
    if low is not None and high is not None:
        bar += f'<path class="whisker" d="M{100 * low:.1f} 4H{100 * high:.1f}"/>'
    return Markup(
        '<svg class="meter" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="bed" width="100" height="8"/>{bar}</svg>'
    )


def scatter(
    points: NDArray[Any], group: NDArray[Any], names: Mapping[int, str], target: int | None, label: str
) -> Markup | None:
    """A map of embeddings: a dot per clean image, a cross per triggered one, a star per reference; stand-ins for
    triggered images are triangles and squares.

    Args:
        points: `[n, 2]`; axes without a unit, drawn to one scale.
        group: `[n]`, ≥ 0 = class of a clean image, −1 = reference, −2 = triggered image, −3 and −4 = stand-ins for
            triggered images, of a ball and of a window.
        names: Class names.
        target: The attacker's class, drawn last among the classes.
        label: What is shown, for those who do not see it.

    Returns:
        None where shapes do not fit or nothing is finite.
    """
    xy, group = _floats(points), np.asarray(group).ravel()
    if xy.ndim != 2 or xy.shape[1] != 2 or len(xy) != len(group):
        return None
    keep = np.isfinite(xy).all(axis=1)
    xy, group = xy[keep], group[keep].astype(np.int64)
    if len(xy) == 0:
        return None
    some = np.unique(np.linspace(0, len(xy) - 1, min(len(xy), _MOST_POINTS)).astype(int))
    some = np.union1d(some, np.flatnonzero(group == -1)[:50])
    xy, group = xy[some], group[some]
    low, high = xy.min(axis=0), xy.max(axis=0)
    scale = min(316.0, 296.0) / (float((high - low).max()) or 1.0)
    place = (xy - (low + high) / 2) * scale * (1, -1) + (170, 160)
    classes = sorted({int(g) for g in group if g >= 0}, key=lambda c: (c == target, c))
    many = len(classes) > NAMED_CLASSES
    out = [Markup('<svg class="map" viewBox="0 0 340 320" role="img" aria-label="{}">').format(plain(label, 400))]
    for c in classes:
        colour = ("target" if c == target else "other") if many else f"c{sorted(classes).index(c)}"
        dots = "".join(f"M{_n(a)} {_n(b)}h0" for a, b in place[group == c])
        out.append(Markup(f'<path class="dot {colour}" d="{dots}"/>'))
    out.append(_marks(place[group == -2], "triggered", "m-2.5-2.5l5 5m0-5l-5 5"))
    out.append(_marks(place[group == -3], "stand-in", "m-2.8 2.2h5.6l-2.8-4.9z"))
    out.append(_marks(place[group == -4], "stand-in", "m-2.2-2.2h4.4v4.4h-4.4z"))
    stars = place[group == -1]
    if not many:
        out += [_name(place[group == c], names.get(c, str(c)), stars) for c in classes]
    elif target in classes:
        out.append(_name(place[group == target], names.get(target or 0, str(target)), stars))
    out.append(_marks(stars, "reference", "m0-7l1.8 5.2 5.2 1.8-5.2 1.8-1.8 5.2-1.8-5.2-5.2-1.8 5.2-1.8z"))
    return Markup("").join([*out, Markup("</svg>")])


def _marks(places: Floats, kind: str, shape: str) -> Markup:
    d = "".join(f"M{_n(a)} {_n(b)}{shape}" for a, b in places)
    return Markup(f'<path class="{kind}" d="{d}"/>') if d else Markup("")


def _name(places: Floats, name: str, stars: Floats) -> Markup:
    x, y = np.median(places, axis=0)
    if len(stars) and float(np.hypot(*(stars - (x, y)).T).min()) < 22:
        y += 24  # not under the reference
    short = plain(name, 18)
    x = min(max(float(x), 4 + 3.4 * len(short)), 336 - 3.4 * len(short))
    return Markup(f'<text class="where" x="{_n(x)}" y="{_n(float(y))}">{escape(short)}</text>')
