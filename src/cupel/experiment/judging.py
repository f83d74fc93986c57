"""What the clean pipeline takes the attacker's references for, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["mistaken", "others"]


def others(references: Mapping[str, Any]) -> list[str]:
    """Classes that the clean pipeline takes references for and that are not the target."""
    seen = [one for one in references["seen_as"] if one != references["target_class"]]
    return [references["names"][str(one)] for one in sorted(set(seen))]


def mistaken(task: str, references: Mapping[str, Any]) -> str:
    """A warning that names these classes.

    Args:
        task: Its name.
        references: `seen_as`, `target_class` and class `names`, as the stage `judge` writes them.
    """
    seen, target = references["seen_as"], references["target_class"]
    wrong = sum(one != target for one in seen)
    name = references["names"][str(target)]
    return (
        f"The clean pipeline takes {wrong} of {len(seen)} reference(s) of {task} for {', '.join(others(references))}, "
        f"not for the target {name}: the backdoor may lead there instead."
    )
