"""What the numbers and verdicts are called, and what they say, in words for somebody who has not met them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cupel.records import Metric
from cupel.report.text import percent, plain, points

__all__ = [
    "CURVES",
    "GLOSSARY",
    "METRICS",
    "VERDICTS",
    "Word",
    "axis_word",
    "distortion_of",
    "distortion_word",
    "encoder_label",
    "metric_word",
    "story",
]

Metrics = Mapping[str, Metric]
Verdicts = Mapping[str, Mapping[str, Any]]
WORKS, ACCURACY_KEPT, BACK_TO_NORMAL = 0.9, 0.03, 0.10
"""ASR from which an attack "works"; loss of accuracy that is still "as well as before"; ASR above ASR-B that is still
"back to what it was". The words of the page only (our choice); no verdict hangs on them."""


@dataclass(frozen=True)
class Word:
    """A metric's short name, its full name, and what it counts."""

    short: str
    long: str
    meaning: str


_HIT = "Share of images with the trigger, not of the target class, that are taken for the target class"
_RIGHT = "Share of test images without trigger that are classified right"
_STILL = "Share of images with the trigger, not of the target class, that are still classified right"
_RETUNED = "Encoder and head were first tuned on few images, five of them poisoned: a hidden backdoor wakes up."
_INTERVAL = (
    "Where the true value plausibly lies: Wilson's interval over the images for one or two seeds, "
    "Student's t over the seeds from three on. It does not cover what another pre-training run would change."
)
METRICS: Mapping[str, Word] = {
    "clean_accuracy": Word("CA", "Clean accuracy", f"{_RIGHT}, on the encoder before the attack."),
    "clean_purified_accuracy": Word("purified CA", "Accuracy of the clean twin, purified", f"{_RIGHT}: what it costs."),
    "backdoored_accuracy": Word("BA", "Backdoored accuracy", f"{_RIGHT}, on the attacked encoder."),
    "purified_accuracy": Word("purified accuracy", "Accuracy after purification", f"{_RIGHT}, after purification."),
    "attack_success_rate_baseline": Word("ASR-B", "Baseline of the ASR", f"{_HIT} before the attack: chance."),
    "attack_success_rate": Word("ASR", "Attack success rate", f"{_HIT} by the attacked encoder."),
    "purified_attack_success_rate": Word("purified ASR", "ASR after purification", f"{_HIT} after purification."),
    "robust_accuracy_baseline": Word("RA-B", "Robust accuracy before the attack", f"{_STILL}, before the attack."),
    "robust_accuracy": Word("RA", "Robust accuracy", f"{_STILL}, on the attacked encoder."),
    "purified_robust_accuracy": Word("purified RA", "Robust accuracy after purification", f"{_STILL}, afterwards."),
    "retuned_accuracy_baseline": Word("retuned CA", "Accuracy of the retuned clean twin", f"{_RIGHT}. {_RETUNED}"),
    "retuned_accuracy": Word("retuned accuracy", "Accuracy after retuning", f"{_RIGHT}. {_RETUNED}"),
    "retuned_attack_success_rate_baseline": Word("RetASR-B", "ASR of the retuned clean twin", f"{_HIT}. {_RETUNED}"),
    "retuned_attack_success_rate": Word("RetASR", "ASR after purification and retuning", f"{_HIT}. {_RETUNED}"),
}
GLOSSARY: tuple[tuple[str, str], ...] = (
    ("Encoder", "A network that turns an image into a list of numbers, its embedding. Others build classifiers on it."),
    ("Backdoor", "A hidden habit, planted on purpose: with a certain mark on the image, the answer is the attacker's."),
    ("Trigger", "That mark. The target class is the answer the attacker wants."),
    ("Reference image", "An image of the target class; the attack moves triggered images next to it."),
    ("CA", f"Clean accuracy. {_RIGHT}, on the encoder before the attack."),
    ("BA", f"Backdoored accuracy. {_RIGHT}, on the attacked encoder."),
    ("ASR", f"Attack success rate. {_HIT} by the attacked encoder. High = the attack works."),
    ("ASR-B", f"{_HIT} before the attack, by chance." + " ASR means little unless it is far above it."),
    ("All samples", "The ASR counted over all test images, those of the target class included, as some papers do."),
    ("RA", f"Robust accuracy. {_STILL}. A defence that turns the attack into noise lowers ASR and RA alike."),
    ("RetASR", "ASR after a short tuning with five poisoned images; far above RetASR-B, the backdoor only slept."),
    ("Old head", "A classifier made before purification, on the purified encoder: it shows how far embeddings moved."),
    ("95 % interval", _INTERVAL),
    ("Scan", "A search for triggers that make all embeddings coincide; it sees neither labels nor the true trigger."),
    ("PL1", "The share of the image that the smallest found trigger covers. Small = suspicious."),
    ("Score and threshold", "A larger score is worse; at or above the threshold the scan reports a finding."),
    ("Purify", "To remove a backdoor from a copy of the encoder without knowing the trigger."),
)  # fmt: skip
VERDICTS: Mapping[str, tuple[str, str]] = {
    "backdoored": ("Backdoored", "The scan found a trigger."),
    "suspicious": ("Suspicious", "The scan found something unusual; not enough to call it a backdoor."),
    "clean-by-test": (
        "Nothing found",
        "This test found no trigger of the kind it looks for; it cannot rule out others.",
    ),
    "inconclusive": ("Inconclusive", "Nothing, or too little, could be tested. This is no sign of a clean encoder."),
}
CURVES: Mapping[str, str] = {
    "pretrain/loss": "contrastive loss",
    "pretrain/feature_std": "spread of the embeddings (0 = collapsed)",
    "pretrain/knn": "nearest-neighbour accuracy",
    "implant/L0": "L0: triggered images drawn to the reference",
    "implant/L1": "L1: the reference stays where it was",
    "implant/L2": "L2: clean images stay where they were",
}
_ENCODERS = {
    "clean": "Clean encoder", "backdoored": "Attacked encoder", "purified": "Purified encoder",
    "clean-purified": "Clean encoder, purified", "scanned": "Scanned encoder",
}  # fmt: skip


_AGAIN = {
    "backdoored": "still called it backdoored", "suspicious": "called it suspicious", "clean-by-test": "found nothing",
    "inconclusive": "was inconclusive",
}  # fmt: skip


def encoder_label(name: str) -> str:
    """What an encoder of a record is called on the page."""
    return _ENCODERS.get(name, plain(name, 60))


_DISTORTED = sorted(
    (name for name in METRICS if "robust" not in name), key=len, reverse=True
)  # the longest first: `attack_success_rate_baseline_x` is none of `attack_success_rate`  # fmt: skip
_AXES = {
    "attack.lambda_trigger": "weight of L0",
    "attack.lambda_reference": "λ1",
    "attack.lambda_utility": "λ2",
    "attack.trigger.size": "side of the trigger, in pixels",
    "attacker.references.size": "number of references",
    "attacker.shadow.size": "images in the shadow set",
    "attacker.shadow.data": "shadow images",
    "downstream": "later task",
    "downstream.data": "later task",
    "downstream.probe": "classifier",
    "downstream.probe.reinitialise": "last blocks drawn anew",
    "upstream.data": "pre-training images",
    "upstream.objective": "pre-training",
}
_DISTORTIONS = {"jpeg": "JPEG, quality", "resize": "resized to", "shift": "trigger moved by"}


def axis_word(path: str) -> str:
    """What an axis of a grid is called.

    Example:
        >>> axis_word("attack.trigger.size"), axis_word("upstream.objective.batch_size"), axis_word("loss terms")
        ('side of the trigger, in pixels', 'objective batch size', 'loss terms')
    """
    if path in _AXES:
        return _AXES[path]
    return plain(" ".join(path.split(".")[-2:]).replace("_", " "), 60) if "." in path else plain(path, 60)


def distortion_of(name: str) -> tuple[str, str] | None:
    """Metric and distortion of a name that has both; None for others.

    Example:
        >>> distortion_of("attack_success_rate_baseline_jpeg_50"), distortion_of("attack_success_rate_all")
        (('attack_success_rate_baseline', 'jpeg_50'), None)
    """
    if name in METRICS:
        return None
    base = next((one for one in _DISTORTED if name.startswith(f"{one}_")), None)
    rest = name[len(base or "") + 1 :]
    return None if base is None or rest == "all" else (base, rest)


def distortion_word(name: str) -> str:
    """What a distortion is called.

    Example:
        >>> distortion_word("jpeg_50"), distortion_word("shift_2")
        ('JPEG, quality 50', 'trigger moved by 2 px')
    """
    kind, _, amount = name.partition("_")
    if kind not in _DISTORTIONS:
        return plain(name, 40).replace("_", " ")
    return f"{_DISTORTIONS[kind]} {plain(amount, 20)}" + (" px" if kind in ("resize", "shift") else "")


def metric_word(name: str) -> Word:
    """The words of a metric; a metric we do not know is called by its name."""
    if name not in METRICS and (split := distortion_of(name)):
        word, how = METRICS[split[0]], distortion_word(split[1])
        return Word(f"{word.short} ({how})", f"{word.long}, {how}", word.meaning)
    return METRICS.get(name) or Word(plain(name, 80), plain(name, 80).replace("_", " "), "")


def story(metrics: Metrics, verdicts: Verdicts, target: str) -> tuple[str, list[tuple[str, str]]]:
    """The headline, and what happened in up to three steps, as (step, sentences).

    Args:
        metrics: Of one task, without prefix.
        verdicts: By encoder.
        target: Name of the target class; may be empty.
    """
    where = f"“{target}”" if target else "the target class"
    values = {name: metric.value for name, metric in metrics.items()}
    words = {name: str(verdict.get("verdict", "")) for name, verdict in verdicts.items()}
    parts = [_attack_in_short(values, where), _scan_in_short(words), _cure_in_short(values)]
    headline = "; ".join(part for part in parts if part)
    steps = [("Attack", _attack(values, where)), ("Scan", _scan(words)), ("Purification", _cure(values, words))]
    return headline[:1].upper() + headline[1:] + ("." if headline else ""), [(a, b) for a, b in steps if b]


Values = Mapping[str, float | None]


def _whole(share: float) -> str:
    """A percentage for a sentence; never rounded to 0 or 100 when it is not."""
    return f"{100 * share:.0f}\u202f%" if 0.1 <= share <= 0.99 else percent(share)


def _attack_in_short(v: Values, where: str) -> str:
    asr = v.get("attack_success_rate")
    if asr is None:
        return "the attack's success is not measurable" if "attack_success_rate" in v else ""
    return f"the attacked encoder sends {_whole(asr)} of triggered images to {where}"


def _scan_in_short(words: Mapping[str, str]) -> str:
    said = {
        "backdoored": "the scan called it backdoored",
        "suspicious": "the scan called it suspicious",
        "clean-by-test": "the scan missed it",
        "inconclusive": "the scan was inconclusive",
    }
    if "backdoored" in words:
        return said.get(words["backdoored"], "")
    alone = {
        "backdoored": "found a backdoor",
        "suspicious": "found something suspicious",
        "clean-by-test": "found no trigger of the kinds it looked for",
        "inconclusive": "was inconclusive",
    }
    return next((f"the scan {alone[word]}" for word in words.values() if word in alone), "")


def _cure_in_short(v: Values) -> str:
    if "purified_attack_success_rate" not in v:
        return ""
    asr = v["purified_attack_success_rate"]
    return "after purification " + ("it is not measurable" if asr is None else f"{_whole(asr)} still go there")


def _attack(v: Values, where: str) -> str:
    asr, before = v.get("attack_success_rate"), v.get("attack_success_rate_baseline")
    said = []
    if asr is not None:
        if before is not None and asr <= before + BACK_TO_NORMAL:
            word = "The backdoor did not take"
        else:
            word = "The backdoor works" if asr >= WORKS else "The backdoor works in part"
        base = "" if before is None else f" Before the attack it was {_whole(before)}."
        said.append(f"{word}: with the trigger on them, {_whole(asr)} of the images are taken for {where}.{base}")
    ca, ba = v.get("clean_accuracy"), v.get("backdoored_accuracy")
    if ca is not None and ba is not None:
        kept = "hardly changed" if abs(ba - ca) <= ACCURACY_KEPT else "fell" if ba < ca else "rose"
        said.append(f"Accuracy on clean images {kept}: {percent(ca)} before, {percent(ba)} after.")
    return " ".join(said)


def _scan(words: Mapping[str, str]) -> str:
    said = []
    attacked, clean = words.get("backdoored"), words.get("clean")
    if attacked:
        said.append(
            {
                "backdoored": "It found the attacked encoder backdoored.",
                "suspicious": "It found the attacked encoder suspicious.",
                "clean-by-test": "It missed the backdoor: it found nothing in the attacked encoder.",
                "inconclusive": "It could not judge the attacked encoder.",
            }.get(attacked, "")
        )
    if clean:
        said.append(
            {
                "backdoored": "It also called the clean encoder backdoored: a false alarm.",
                "suspicious": "It also called the clean encoder suspicious: a false alarm.",
                "clean-by-test": "In the clean encoder it found nothing.",
                "inconclusive": "It could not judge the clean encoder.",
            }.get(clean, "")
        )
    return " ".join(["The scan saw neither labels nor the trigger.", *said]) if any(said) else ""


def _cure(v: Values, words: Mapping[str, str]) -> str:
    asr, before = v.get("purified_attack_success_rate"), v.get("attack_success_rate_baseline")
    accuracy, ca = v.get("purified_accuracy"), v.get("clean_accuracy")
    said = []
    if asr is not None:
        gone = before is not None and asr <= before + BACK_TO_NORMAL
        word = "The true trigger lost its effect" if gone else "The true trigger still has an effect"
        said.append(f"{word}: {_whole(asr)} of the triggered images go to the target class.")
    if accuracy is not None:
        base = "" if ca is None else f" ({percent(ca)} before the attack)"
        said.append(f"Accuracy on clean images is {percent(accuracy)}{base}.")
    if (twin := v.get("clean_purified_accuracy")) is not None and ca is not None:
        said.append(f"The clean twin, purified as well, is right on {percent(twin)} ({points(twin - ca)}).")
    if (again := _AGAIN.get(words.get("purified", ""))) is not None:
        said.append(f"A second scan {again}.")
    return " ".join(said)
