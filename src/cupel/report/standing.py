"""Where encoders lie among the clean ones that a scanner was calibrated with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from cupel.records import Record
from cupel.report.gallery import in_order
from cupel.report.svg import nice_ticks
from cupel.report.text import figure, number_of, plain
from cupel.report.words import VERDICTS, encoder_label

__all__ = ["Mark", "standings_of", "strip_chart"]

View = dict[str, Any]
_MOST = 200
_LEFT, _RIGHT, _TOP, _ROW = 14.0, 326.0, 24.0, 34.0
_LETTER = 7.4  # pixels that a letter of a row's name takes at most, on average


class Mark(NamedTuple):
    """An encoder on the strip: its name, score and verdict word."""

    name: str
    score: float
    word: str


def standings_of(record: Record) -> View | None:
    """A strip per scanner that was calibrated, and the names of those that were not; None without verdicts.

    Encoders that a scanner judged by the same clean encoders share a strip. An inconclusive verdict has no place on it.
    """
    groups: dict[tuple[str, tuple[float, ...], float], list[Mark]] = {}
    fixed: list[str] = []
    unwritten: list[str] = []
    for encoder, scanner, said in _verdicts(record):
        word, score, threshold = str(said.get("verdict", "")), said.get("score"), number_of(said.get("threshold"))
        clean, found = _scores(said.get("clean_scores")), number_of(score)
        if word == "inconclusive" or found is None or threshold is None:
            continue
        if clean:
            mark = Mark(encoder_label(encoder), found, word if word in VERDICTS else "unknown")
            groups.setdefault((plain(scanner, 60), clean, threshold), []).append(mark)
        else:
            (fixed if said.get("false_alarm") is None else unwritten).append(plain(scanner, 60))
    strips = [
        {
            "scanner": scanner,
            "clean": len(clean),
            "low": figure(min(clean)),
            "high": figure(max(clean)),
            "threshold": figure(threshold),
            "chart": strip_chart(clean, threshold, marks),
        }
        for (scanner, clean, threshold), marks in groups.items()
    ]
    known = {scanner for scanner, _, _ in groups}
    rest = [", ".join(dict.fromkeys(one for one in names if one and one not in known)) for names in (fixed, unwritten)]
    if not (strips or fixed or unwritten):
        return None
    return {"strips": strips, "fixed": rest[0], "any_fixed": bool(set(fixed) - known), "unwritten": bool(unwritten)}


def _verdicts(record: Record) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Encoder, scanner and verdict: each scanner's own where they are told, else the one that counts, of no name."""
    told = record.extra.get("scans")
    scans = told if isinstance(told, Mapping) else {}
    for encoder in in_order(record.verdicts):
        each = scans.get(encoder)
        named = {str(k): v for k, v in each.items() if isinstance(v, Mapping)} if isinstance(each, Mapping) else {}
        for scanner, said in (named or {"": record.verdicts[encoder]}).items():
            yield encoder, scanner, said


def _scores(value: Any) -> tuple[float, ...]:
    """Finite numbers; empty where there is anything else."""
    if not isinstance(value, list | tuple) or len(value) > _MOST:
        return ()
    scores = [number_of(one) for one in value]
    return tuple(one for one in scores if one is not None) if None not in scores else ()


def strip_chart(clean: Sequence[float], threshold: float, marks: Sequence[Mark]) -> Markup:
    """One axis of scores: a tick per clean encoder, a dashed line at the threshold, a named dot per encoder.

    Args:
        clean: Scores of the clean encoders, at least one.
        threshold: At or above it lies a finding.
        marks: The encoders that were judged by them.
    """
    ticks = nice_ticks(
        min(*clean, threshold, *(m.score for m in marks)), max(*clean, threshold, *(m.score for m in marks))
    )
    bottom = _TOP + _ROW * (1 + len(marks)) + 8

    def px(score: float) -> float:
        return _LEFT + (score - ticks[0]) / (ticks[-1] - ticks[0]) * (_RIGHT - _LEFT)

    many = f"{len(clean)} clean encoders" if len(clean) > 1 else "1 clean encoder"
    said = "; ".join(f"{m.name} {figure(m.score)}, {_word(m)}" for m in marks)
    label = f"Scores: {many} from {figure(min(clean))} to {figure(max(clean))}; threshold {figure(threshold)}; {said}"
    out = [Markup('<svg class="chart" viewBox="0 0 340 {:g}" role="img" aria-label="{}">').format(
        bottom + 36, plain(label, 400)
    )]  # fmt: skip
    for t in ticks:
        out.append(Markup(f'<path class="grid" d="M{px(t):.1f} {_TOP:g}V{bottom:g}"/>'))
        out.append(Markup(f'<text class="tx" x="{px(t):.1f}" y="{bottom + 15:g}">{figure(t)}</text>'))
    out.append(Markup(f'<path class="axis" d="M{_LEFT:g} {bottom:g}H{_RIGHT:g}"/>'))
    out.append(Markup(f'<text class="tx" x="170" y="{bottom + 31:g}">score; larger is worse</text>'))
    out.append(Markup(f'<path class="limit" d="M{px(threshold):.1f} {_TOP - 6:g}V{bottom:g}"/>'))
    out.append(_text("tx", px(threshold), _TOP - 10, f"threshold {figure(threshold)}"))
    places = [px(score) for score in clean]
    y = _TOP + 10
    out.append(_text("where", (min(places) + max(places)) / 2, y, many))
    out.append(Markup('<path class="peer" d="{}"/>').format("".join(f"M{x:.1f} {y + 8:g}v12" for x in places)))
    for i, mark in enumerate(marks, 1):
        x, y = px(mark.score), _TOP + 10 + _ROW * i
        out.append(_text("where", x, y, f"{plain(mark.name, 28)} {figure(mark.score)}"))
        out.append(Markup('<path class="mark {}" d="M{:.1f} {:g}h0"/>').format(mark.word, x, y + 14))
    return Markup("").join([*out, Markup("</svg>")])


def _word(mark: Mark) -> str:
    return VERDICTS[mark.word][0].lower() if mark.word in VERDICTS else "unknown"


def _text(kind: str, x: float, y: float, text: str) -> Markup:
    """A name in the middle over `x`, moved to where it does not leave the chart."""
    half = _LETTER * len(text) / 2
    x = min(max(x, 2 + half), 338 - half)
    return Markup(f'<text class="{kind}" x="{x:.1f}" y="{y:g}">{escape(text)}</text>')
