"""Randomness as an argument: a seed, and named children of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["Seed"]


@dataclass(frozen=True)
class Seed:
    """A source of randomness. Children are independent by name, so a new consumer does not shift the others.

    Nothing in Cupel seeds a global generator, and no generator lives longer than one step of a loop:
    step `t` draws from `seed.child("step", t)`, which is why a resumed run repeats the unbroken one.

    Args:
        value: Any integer; 0 ≤ value < 2⁶³ for a seed given by a user.

    Example:
        >>> Seed(0).child("poison") == Seed(0).child("poison")
        True
        >>> Seed(0).child("poison") == Seed(0).child("pretrain")
        False
    """

    value: int

    def child(self, *names: str | int) -> Seed:
        """The seed for a named part of the work."""
        text = "/".join([str(self.value), *map(str, names)])
        return Seed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1)

    def torch(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh `torch.Generator` on `device`."""
        import torch

        return torch.Generator(device=device).manual_seed(self.value)

    def numpy(self) -> np.random.Generator:
        """A fresh NumPy generator."""
        import numpy as np

        return np.random.default_rng(self.value)
