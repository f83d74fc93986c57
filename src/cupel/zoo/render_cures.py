"""What purifiers did, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from cupel.zoo.cures import Cure, Summary
from cupel.zoo.markdown import table

__all__ = ["render_cures"]

_WORDS = {"all": "all patches and blends that work"}


def render_cures(cures: Sequence[Cure], summaries: Sequence[Summary], failed: Sequence[tuple[str, str]]) -> str:
    """Tables of purifiers: shares of the goals, means, and each encoder; empty where none was tried."""
    if not cures:
        return ""
    parts = [_goals(summaries), _means(summaries), _costs(summaries), _each(cures)]
    if failed:
        parts.append("\n".join(["What failed:", "", *(f"- {name}: {reason}" for name, reason in failed)]))
    return "\n\n".join(parts) + "\n"


def _goals(summaries: Sequence[Summary]) -> str:
    rows = [
        [one.purifier, _group(one.group), str(one.encoders), f"{one.removed} of {one.encoders}",
         f"{one.robust} of {one.encoders}", f"{one.lasting} of {one.measured}"]
        for one in summaries
    ]  # fmt: skip
    header = ["purifier", "encoders", "n", "removed", "robust", "lasting"]
    note = (
        "Removed: attack success at most 5 points above the clean twin's, accuracy at most 2 points below the "
        "encoder's as given. Robust: at least 0.9 of the clean twin's robust accuracy. Lasting: after retuning with "
        "five poisoned images, attack success at most 10 points above that of the clean twin retuned alike. Means of "
        "new heads; only encoders whose backdoor worked (ASR ≥ 50 %)."
    )
    return "\n".join(["## Purifiers: goals met", "", *table(header, rows), "", note])


def _means(summaries: Sequence[Summary]) -> str:
    names = ("accuracy", "accuracy given", "asr", "asr given", "asr twin", "robust", "robust twin", "retuned",
             "retuned twin", "to twin")  # fmt: skip
    header = ["purifier", "encoders", *(_HEADS[name] for name in names), "seconds"]
    rows = []
    for one in summaries:
        if one.group == "all" or one.group.startswith("zoo:") or one.group == "large patches":
            cells = [_mean(one, name) for name in names]
            seconds = one.means.get("seconds")
            rows.append([one.purifier, _group(one.group), *cells, "–" if seconds is None else f"{seconds[0]:.0f}"])
    return "\n".join(
        ["## Purifiers: means over encoders", "", *table(header, rows), "", "In per cent; 95 % intervals."]
    )


def _costs(summaries: Sequence[Summary]) -> str:
    header = ["purifier", "n", "accuracy, old heads", "ASR, old heads", "seconds", "images forward", "images backward",
              "peak memory MiB"]  # fmt: skip
    rows = []
    for one in summaries:
        if one.group == "all":
            counts = ["–" if x not in one.means else f"{one.means[x][0]:,.0f}" for x in _COUNTS]
            heads = [_mean(one, "old accuracy"), _mean(one, "old asr")]
            rows.append([one.purifier, str(one.encoders), *heads, *counts])
    note = (
        "Means over encoders. Old heads: classifiers that were fitted on the encoder as given, put on the purified "
        "one, per cent with 95 % intervals. Seconds, images and memory are of purification alone, one core of a busy "
        "machine; images count every pass through an encoder; memory is what the process had held until then."
    )
    return "\n".join(["## Purifiers: old heads and cost", "", *table(header, rows), "", note])


_COUNTS = ("seconds", "forward", "backward", "memory")
_HEADS = {
    "accuracy": "accuracy", "accuracy given": "as given", "asr": "ASR", "asr given": "as given",
    "asr twin": "of the twin", "robust": "robust accuracy", "robust twin": "of the twin", "retuned": "retuned ASR",
    "retuned twin": "of the twin", "to twin": "cosine to the twin",
}  # fmt: skip


def _each(cures: Sequence[Cure]) -> str:
    rows = []
    for one in cures:
        cases = {"as given": one.given, "clean twin": one.twin, **one.purified}
        for name, v in cases.items():
            again = "–" if v.retuned is None else f"{100 * v.retuned:.1f}"
            met = "" if name not in one.purified else _met(one, name)
            rows.append([
                one.name, "–" if one.area is None else f"{100 * one.area:.1f}", name, f"{100 * v.accuracy:.1f}",
                f"{100 * v.asr:.1f}", f"{100 * v.robust:.1f}", again, met,
            ])  # fmt: skip
    header = ["encoder", "area", "", "accuracy", "ASR", "robust accuracy", "retuned ASR", "goals"]
    note = "In per cent. Goals: R = removed, B = robust, L = lasting."
    return "\n".join(["## Purifiers: every encoder", "", *table(header, rows), "", note])


def _met(one: Cure, name: str) -> str:
    return "".join(
        letter for letter, met in (("R", one.removed(name)), ("B", one.robust(name)), ("L", one.lasting(name))) if met
    )


def _group(group: str) -> str:
    return _WORDS.get(group, group.partition(":")[2] or group)


def _mean(one: Summary, name: str) -> str:
    if name not in one.means:
        return "–"
    middle, low, high = one.means[name]
    if low is None or high is None:
        return f"{100 * middle:.1f}"
    return f"{100 * middle:.1f} ({100 * low:.1f}–{100 * high:.1f})"
