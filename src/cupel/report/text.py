"""Names and numbers as they are shown: names made harmless, shares as percentages, times as people say them."""

from __future__ import annotations

import math
import re
import unicodedata

__all__ = ["NOT_MEASURABLE", "figure", "interval", "number_of", "percent", "plain", "points", "short_key", "span"]

NOT_MEASURABLE = "not measurable"
_ANSI = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?")
_NARROW = "\u202f"


def plain(text: object, limit: int = 200, *, lines: bool = False) -> str:
    """A text out of a record that may be hostile: no ANSI codes, controls or direction marks, and not endless.

    Args:
        text: Anything; its `str` is taken.
        limit: Characters kept; what is cut is shown by an ellipsis.
        lines: Keep line breaks; else they become spaces.

    Example:
        >>> plain("a" + chr(27) + "[31m" + chr(0x202E) + "b")
        'ab'
    """
    whole = str(text)
    kept = []
    for c in _ANSI.sub("", whole[: 8 * limit]):
        kind = unicodedata.category(c)
        if c == "\n" and lines:
            kept.append(c)
        elif kind in ("Zl", "Zp") or c in "\t\n\r\v\f":
            kept.append(" ")
        elif kind == "Cs":
            kept.append("\ufffd")
        elif kind not in ("Cc", "Cf"):
            kept.append(c)
    made = "".join(kept)
    return made[:limit].rstrip() + "…" if len(made) > limit or len(whole) > 8 * limit else made


def percent(share: float | None, unit: bool = True) -> str:
    """A share in [0, 1] as a percentage with one decimal; only an exact 0 or 1 reads as 0.0 or 100.0.

    Example:
        >>> percent(0.8184, unit=False), percent(0.99965, unit=False), percent(1.0, unit=False), percent(None)
        ('81.8', '99.97', '100.0', 'not measurable')
    """
    if share is None:
        return NOT_MEASURABLE
    return _number(share) + (_NARROW + "%" if unit else "")


def _number(share: float) -> str:
    if share < 1e-9 or share > 1 - 1e-9:  # the ends of Wilson's interval miss 0 and 1 by rounding
        return "0.0" if share < 0.5 else "100.0"
    if share < 5e-5:
        return f"<{_NARROW}0.01"
    if share > 1 - 5e-5:
        return f">{_NARROW}99.99"
    return f"{100 * share:.{2 if share < 5e-4 or share >= 1 - 5e-4 else 1}f}"


def interval(low: float | None, high: float | None, unit: bool = True) -> str:
    """Both ends as percentages; empty where there is no interval.

    Example:
        >>> interval(0.5, 0.75, unit=False)
        '50.0–75.0'
    """
    if low is None or high is None:
        return ""
    return f"{_number(low)}–{_number(high)}" + (_NARROW + "%" if unit else "")


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign.

    Example:
        >>> points(-0.0125)
        '−1.2 points'
    """
    rounded = f"{100 * abs(difference):.1f}"
    sign = "±" if rounded == "0.0" else "+" if difference > 0 else "−"
    return f"{sign}{rounded} points"


def span(seconds: float) -> str:
    """A duration in words.

    Example:
        >>> span(0.25), span(12.3), span(75), span(4000)
        ('0.25 s', '12 s', '1 min 15 s', '1 h 7 min')
    """
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def short_key(key: object) -> str:
    """The first twelve characters of a cache key: enough to find it by."""
    return plain(key, 64)[:12]


def number_of(value: object) -> float | None:
    """The value where it is a finite number, else None; a record may hold anything."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def figure(value: object) -> str:
    """Four digits of a number, a dash where there is none.

    Example:
        >>> figure(-0.123456), figure("x")
        ('−0.1235', '–')
    """
    number = number_of(value)
    return "–" if number is None else f"{number:.4g}".replace("-", "−")
