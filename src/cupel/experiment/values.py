"""What stages hand to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupel.encoders import ImageEncoder

__all__ = ["Context", "Value", "curves"]

Value = Any
"""An `Artefact`, a `Dataset` (stage `data`) or a `Poisoned` (stage `poison`)."""


class Context:
    """Where the work is done, and beside what.

    Args:
        device: `cpu`, `cuda`, ….
        checkpoint: File for the state of a long step; None = keep none.
        twin: The clean encoder that an attacked one stands beside; None = it is among the inputs, or there is none.
    """

    def __init__(self, device: str, checkpoint: Path | None, twin: ImageEncoder | None = None) -> None:
        self.device, self.checkpoint, self.twin = device, checkpoint, twin


def curves(stage: str, history: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray[Any, Any]]:
    """A training's numbers as arrays `curve/<stage>/<name>`; those of a monitor with the steps it looked at."""
    made = {}
    for name, values in history.items():
        if name == "step@watch":
            continue
        key = f"curve/{stage}/{name.removesuffix('@watch')}"
        made[key] = np.asarray(values, dtype=np.float32)
        if name.endswith("@watch"):
            made[f"{key}/step"] = np.asarray(history["step@watch"], dtype=np.int64)
    return made
