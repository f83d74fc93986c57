"""Which tensor of a checkpoint is which of an encoder, whatever was wrapped around it when it was saved."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cupel.checkpoint.text import shown
from cupel.errors import CheckpointError, did_you_mean

__all__ = ["KeyMap", "match_keys"]

Shape = tuple[int, ...]

# What training scripts wrap around an encoder; any nesting of these may stand before its names.
_WRAPPER_WORDS = "module encoder backbone encoder_q _orig_mod visual f model state_dict model_state_dict net student"
WRAPPERS = frozenset(_WRAPPER_WORDS.split())
# What stands beside an encoder in a checkpoint and is no part of it.
_COMPANION_WORDS = """
    projector projection projection_head proj_head predictor prediction_head head heads mlp_head fc classifier linear
    g queue queue_ptr queue_size queue_index encoder_k momentum_encoder momentum_backbone momentum_projector
    backbone_momentum projection_head_momentum key_encoder target_encoder teacher ema optimizer optimizer_state_dict
    optim optimizers optimizer_states lr_scheduler scheduler lr_schedulers scaler amp prototypes memory_bank criterion
    loss temperature logit_scale
"""
COMPANIONS = frozenset(_COMPANION_WORDS.split())
_UNUSED_LEAVES = ("num_batches_tracked", "total_ops", "total_params")


@dataclass(frozen=True)
class KeyMap:
    """How an encoder's tensors are named in a file.

    Args:
        names: Name in the file by name in the encoder.
        prefix: What stands before the names in the file.
        ignored: Names in the file that belong to known companions of an encoder.
    """

    names: dict[str, str]
    prefix: str
    ignored: tuple[str, ...]


def match_keys(
    found: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    where: object,
    allow_missing: Sequence[str] = (),
) -> KeyMap:
    """Match an encoder's tensors to those of a file, or say why that cannot be done.

    Every nesting of the known wrappers that occurs in the file is tried, with names as they are and with the numbers
    that `nn.Sequential(*resnet.children())` gives; the one that covers the most expected names wins.

    Args:
        found: Shapes by flat dotted name, as `read_tensors` gives them.
        expected: Shapes by name, as the encoder's `state_dict()` has them.
        where: The file, for errors.
        allow_missing: Patterns (`*.num_batches_tracked`) of expected names that may be absent.

    Returns:
        The map, complete but for what `allow_missing` names.

    Raises:
        CheckpointError: `missing-keys`, `wrong-shape`, `unexpected-keys`, or `ambiguous-keys` where two parts of the
            file fit equally well.

    Example:
        >>> shapes = {"conv1.weight": (64, 3, 3, 3)}
        >>> file = {"state_dict.module.encoder_q.conv1.weight": (64, 3, 3, 3), "state_dict.module.queue": (128, 4096)}
        >>> match_keys(file, shapes, "moco.pth")
        KeyMap(names={'conv1.weight': 'state_dict.module.encoder_q.conv1.weight'}, \
prefix='state_dict.module.encoder_q.', ignored=('state_dict.module.queue',))
    """
    prefix, names = _best(found, expected, where)
    missing = [name for name in expected if name not in names and not _allowed(name, allow_missing)]
    if missing or (expected and not names):
        raise _missing(missing or list(expected), found, expected, prefix, where)
    wrong = [name for name, there in names.items() if tuple(found[there]) != tuple(expected[name])]
    if wrong:
        name = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        what = f"tensor '{shown(names[name])}' is {found[names[name]]}, expected {expected[name]}{more}"
        raise CheckpointError(where, what, "choose the architecture and width it was saved from", code="wrong-shape")
    used = set(names.values())
    rest = [name for name in found if name not in used]
    strange = [name for name in rest if not _is_companion(name, prefix)]
    if strange:
        what = f"holds {len(strange)} tensors that the encoder has no place for: {_listed(strange)}"
        raise CheckpointError(where, what, "choose the architecture it was saved from", code="unexpected-keys")
    return KeyMap(names, prefix, tuple(rest))


def _best(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: object) -> tuple[str, dict[str, str]]:
    ranked: list[tuple[int, str, dict[str, str]]] = []
    for prefix in _prefixes(found):
        for layout in _LAYOUTS:
            names = {name: prefix + layout(name) for name in expected if prefix + layout(name) in found}
            ranked.append((len(names), prefix, names))
    ranked.sort(key=lambda candidate: (-candidate[0], len(candidate[1]), candidate[1]))
    count, prefix, names = ranked[0]
    rivals = {p for c, p, n in ranked[1:] if c == count and set(n.values()) != set(names.values())}
    if count == len(expected) and count and rivals - {prefix}:
        both = ", ".join(f"'{shown(p)}'" for p in sorted({prefix, *rivals})[:3])
        what = f"holds several encoders that fit equally well, under {both}"
        raise CheckpointError(where, what, "save the one that is meant alone", code="ambiguous-keys")
    return prefix, names


def _prefixes(found: Iterable[str]) -> list[str]:
    prefixes = {""}
    for name in found:
        prefix = ""
        for part in name.split(".")[:-1]:
            if part not in WRAPPERS:
                break
            prefix += part + "."
            prefixes.add(prefix)
    return sorted(prefixes)


def _numbered(order: str) -> Callable[[str], str]:
    places = {name: str(place) for place, name in enumerate(order.split())}

    def rename(name: str) -> str:
        first, dot, rest = name.partition(".")
        return places.get(first, first) + dot + rest

    return rename


_LAYOUTS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    # BadEncoder's published SimCLR encoders: a ResNet's children in order, without max-pooling and the last layer.
    _numbered("conv1 bn1 relu layer1 layer2 layer3 layer4"),
    _numbered("conv1 bn1 relu maxpool layer1 layer2 layer3 layer4"),
)


def _allowed(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_companion(name: str, prefix: str) -> bool:
    if name.rpartition(".")[2] in _UNUSED_LEAVES:
        return True
    parts = name.removeprefix(prefix).split(".")
    while len(parts) > 1 and parts[0] in WRAPPERS:
        parts = parts[1:]
    return parts[0] in COMPANIONS


def _missing(
    missing: Sequence[str], found: Mapping[str, Shape], expected: Mapping[str, Shape], prefix: str, where: object
) -> CheckpointError:
    what = f"lacks {len(missing)} of the encoder's {len(expected)} tensors: {_listed(missing)}"
    if len(missing) == len(expected):
        todo = f"its tensors are called {_listed(list(found))}; choose the architecture they belong to"
    elif len(missing) <= 3:
        inside = [name.removeprefix(prefix) for name in found if name.startswith(prefix)]
        todo = did_you_mean(missing[0], [shown(name) for name in inside], limit=5)
    else:
        todo = "choose the architecture it was saved from, or allow what may be missing"
    return CheckpointError(where, what, todo, code="missing-keys")


def _listed(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(shown(name, 80) for name in names[:limit]) + (", …" if len(names) > limit else "")
