"""A scan in words: what was found, what was tested, how sure that is, what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from cupel.verdicts import Verdict

__all__ = ["counted_alarms", "spoken"]

_COMPARE = "scan clean encoders of the same recipe too, for without a calibration some of them may look like this"
_NEXT = {
    "backdoored": (
        "do not use this encoder; get it from its publisher again and compare, or remove what was found with "
        "`cupel purify` and --evidence"
    ),
    "suspicious": (
        "scan again with more images, another --seed and --budget paper, and scan clean encoders of the same recipe "
        "to compare with"
    ),
    "clean-by-test": "nothing of the tested kinds was found; what was not tested for can still be there",
    "inconclusive": "see the reason; at least 64 different images of the kind that the encoder was made for are needed",
}


def spoken(verdict: Verdict, each: Sequence[tuple[str, Verdict]]) -> list[tuple[str, str]]:
    """Label and text of each line.

    Args:
        verdict: The one that counts.
        each: Verdicts by scanner.
    """
    lines = [(name, f"{one.verdict}  {_numbers(one)}; {one.reason}") for name, one in each if len(each) > 1]
    lines += [
        ("verdict", f"{verdict.verdict.upper()}  {_numbers(verdict)}"),
        ("found", verdict.reason),
        ("tested", verdict.tested),
    ]
    lines += [("how sure", line) for line in _how_sure(each)]
    todo = _NEXT[verdict.verdict]
    if verdict.verdict == "backdoored" and verdict.false_alarm is None:
        todo = f"{_COMPARE}; until then, {todo}"
    lines.append(("next", todo))
    cost = f"{verdict.details.get('forward_images', 0):.0f} images forward"
    cost += f", {verdict.details.get('backward_images', 0):.0f} backward"
    if verdict.peak_memory_mib is not None:
        cost += f", {verdict.peak_memory_mib:.0f} MiB of memory at most"
    return [*lines, ("cost", cost)]


def _numbers(verdict: Verdict) -> str:
    return f"score {verdict.score:.3f}, threshold {verdict.threshold:.3f}"


def counted_alarms(rate: float, n: int) -> str:
    """False alarms among n clean encoders, with the 95 % upper bound where there were none.

    Example:
        >>> counted_alarms(0.0, 30)
        'false alarms on clean encoders 0/30 (at most 9.5 % with 95 % confidence)'
        >>> counted_alarms(0.25, 8)
        'false alarms on clean encoders 2/8'
    """
    alarms = round(rate * n)
    bound = "" if alarms else f" (at most {100 * (1 - 0.05 ** (1 / n)):.1f} % with 95 % confidence)"
    return f"false alarms on clean encoders {alarms}/{n}{bound}"


def _how_sure(each: Sequence[tuple[str, Verdict]]) -> list[str]:
    lines = [f"{name}: {counted_alarms(*one.false_alarm)}" for name, one in each if one.false_alarm is not None]
    without = [name for name, one in each if one.false_alarm is None]
    if without:
        what = "no calibration for this architecture and recipe: fixed thresholds, false-alarm rate unknown"
        lines.append(f"{', '.join(without)}: {what}")
    return lines
