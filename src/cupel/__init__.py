"""Cupel measures, finds and removes backdoors in pre-trained encoders.

`import cupel` is light: what `cupel.api` offers is loaded when it is first touched.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

__all__ = ["__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # `from cupel import data` asks here first; a subpackage must not wait for the whole of cupel.api
    if not name.startswith("_") and importlib.util.find_spec(f"cupel.{name}") is None:
        api = importlib.import_module("cupel.api")
        if name in api.__all__:
            return getattr(api, name)
    raise AttributeError(f"module 'cupel' has no attribute '{name}'")
