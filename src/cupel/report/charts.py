"""Charts of grids as inline SVG: lines over numbers, dots over names, and heat maps; each with its intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from cupel.report.text import plain

__all__ = ["Point", "Series", "dot_chart", "heat_map", "interval_chart"]

_WIDTH = 340.0
_LETTER = 6.2  # pixels that a letter of the charts' text takes at most, on average


class Point(NamedTuple):
    """A share in [0, 1] with the ends of its interval, which may be missing."""

    value: float
    low: float | None
    high: float | None


class Series(NamedTuple):
    """What is drawn in one colour.

    Args:
        kind: Classes of the style sheet.
        points: One per place of the axis; None = not measured there.
    """

    kind: str
    points: Sequence[Point | None]


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _open(height: float, label: str) -> Markup:
    opened = '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">'
    return Markup(opened).format(_n(_WIDTH), _n(height), plain(label, 400))


def _percent_grid(top: float, bottom: float, left: float, *, across: bool) -> str:
    """Five lines at 0, 25, … 100 % with their names: level ones, or upright ones where `across`."""
    out = ""
    for step in range(5):
        share = step / 4
        if across:
            at = _n(left + share * (_WIDTH - 16 - left))
            out += f'<path class="grid" d="M{at} {_n(top)}V{_n(bottom)}"/>'
            out += f'<text class="tx" x="{at}" y="{_n(bottom + 15)}">{25 * step}</text>'
        else:
            at = _n(bottom - share * (bottom - top))
            out += f'<path class="grid" d="M{_n(left)} {at}H{_n(_WIDTH - 10)}"/>'
            out += f'<text class="ty" x="{_n(left - 6)}" y="{at}">{25 * step}</text>'
    return out


def interval_chart(
    xs: Sequence[float], names: Sequence[str], series: Sequence[Series], title: str, label: str
) -> Markup:
    """Percentages over a number: a line per series, and at each point its interval.

    Args:
        xs: Ascending. All positive and the largest 20 times the smallest or more: on a logarithmic scale.
        names: How each of them is written.
        series: Shares, one point per x.
        title: Name of the axis.
        label: What is shown, for those who do not see it.
    """
    top, bottom, left, right = 12.0, 178.0, 36.0, _WIDTH - 16
    log = len(xs) > 1 and xs[0] > 0 and xs[-1] >= 20 * xs[0]
    places = [math.log(x) if log else x for x in xs]
    span = (places[-1] - places[0]) or 1.0
    px = [left + 8 + (p - places[0]) / span * (right - left - 16) for p in places]

    def py(share: float) -> float:
        return bottom - share * (bottom - top)

    out = [_open(222, label), Markup(_percent_grid(top, bottom, left, across=False))]
    free = -math.inf
    for x, name in zip(px, names, strict=True):
        half = _LETTER * len(name) / 2
        if x - half > free:  # names that would touch the one before are left out
            at = min(x, _WIDTH - 2 - half)
            out.append(Markup('<text class="tx" x="{}" y="195">{}</text>').format(_n(at), name))
            free = at + half + 4
    out.append(Markup('<text class="tx" x="{}" y="215">{}</text>').format(_n((left + right) / 2), plain(title, 50)))
    width = 5.0
    for i, one in enumerate(series):
        here = [(x + 1.6 * (i - (len(series) - 1) / 2), p) for x, p in zip(px, one.points, strict=True) if p]
        line = " ".join(f"{_n(x)},{_n(py(p.value))}" for x, p in here)
        ends = "".join(
            f"M{_n(x)} {_n(py(p.low))}V{_n(py(p.high))}M{_n(x - width / 2)} {_n(py(p.low))}h{_n(width)}"
            f"M{_n(x - width / 2)} {_n(py(p.high))}h{_n(width)}"
            for x, p in here
            if p.low is not None and p.high is not None
        )
        dots = "".join(f"M{_n(x)} {_n(py(p.value))}h0" for x, p in here)
        out.append(Markup(f'<polyline class="series {one.kind}" points="{line}"/>') if len(here) > 1 else Markup(""))
        out.append(Markup(f'<path class="ends {one.kind}" d="{ends}"/><path class="spot {one.kind}" d="{dots}"/>'))
    return Markup("").join([*out, Markup("</svg>")])


def dot_chart(rows: Sequence[str], series: Sequence[Series], label: str) -> Markup:
    """Percentages over names: a block per name, in it a dot with its interval per series.

    Args:
        rows: Names, from the top.
        series: Shares, one point per row.
        label: What is shown, for those who do not see it.
    """
    step = 8.0
    block, left, top = 24 + step * len(series), 12.0, 4.0
    bottom = top + block * len(rows)
    out = [_open(bottom + 34, label), Markup(_percent_grid(top, bottom, left, across=True))]
    for i, row in enumerate(rows):
        y = top + i * block + 13
        out.append(Markup('<text class="name" x="{}" y="{}">{}</text>').format(_n(left), _n(y), plain(row, 48)))
        for j, one in enumerate(series):
            p = one.points[i]
            if p is None:
                continue
            at, x = _n(y + 8 + step * j), [left + share * (_WIDTH - 16 - left) for share in (p.value, p.low or 0)]
            ends = ""
            if p.low is not None and p.high is not None:
                ends = f"M{_n(x[1])} {at}H{_n(left + p.high * (_WIDTH - 16 - left))}"
            out.append(Markup(f'<path class="ends {one.kind}" d="{ends}"/>') if ends else Markup(""))
            out.append(Markup(f'<path class="spot {one.kind}" d="M{_n(x[0])} {at}h0"/>'))
    out.append(Markup('<text class="tx" x="170" y="{}">% of the images</text>').format(_n(bottom + 30)))
    return Markup("").join([*out, Markup("</svg>")])


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    shares: Sequence[Sequence[float | None]],
    titles: tuple[str, str],
    kind: str,
    label: str,
) -> Markup:
    """Percentages over two axes: a square per pair, the darker the larger, with the number in it.

    Args:
        rows, columns: Names, from the top and from the left.
        shares: By row and column; None = not measured.
        titles: Names of the two axes.
        kind: Class of the style sheet that gives the colour.
        label: What is shown, for those who do not see it.
    """
    left = min(120.0, 14 + _LETTER * max(map(len, rows)))
    wide, high, top = (_WIDTH - 6 - left) / len(columns), 30.0, 40.0
    out = [_open(top + high * len(rows) + 6, label)]
    out.append(Markup('<text class="name" x="2" y="12">{} ↓</text>').format(plain(titles[0], 24)))
    out.append(Markup('<text class="ty" x="{}" y="9">{} →</text>').format(_n(_WIDTH - 6), plain(titles[1], 24)))
    for j, column in enumerate(columns):
        text = plain(column, max(3, int(wide / _LETTER)))
        out.append(Markup('<text class="tx" x="{}" y="33">{}</text>').format(_n(left + (j + 0.5) * wide), text))
    for i, row in enumerate(rows):
        y = top + i * high
        text = plain(row, int((left - 8) / _LETTER))
        out.append(Markup('<text class="ty" x="{}" y="{}">{}</text>').format(_n(left - 6), _n(y + high / 2), text))
        for j, share in enumerate(shares[i]):
            x = left + j * wide
            box = f'x="{_n(x + 1)}" y="{_n(y + 1)}" width="{_n(wide - 2)}" height="{_n(high - 2)}"'
            strength = 0.04 if share is None else 0.06 + 0.5 * share
            number = "–" if share is None else f"{100 * share:.0f}" if wide < 40 else f"{100 * share:.1f}"
            out.append(Markup(f'<rect class="heat {escape(kind)}" fill-opacity="{strength:.2f}" {box}/>'))
            place = f'x="{_n(x + wide / 2)}" y="{_n(y + high / 2)}"'
            out.append(Markup(f'<text class="within" {place}>{number}</text>'))
    return Markup("").join([*out, Markup("</svg>")])
