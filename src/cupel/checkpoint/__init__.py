"""Checkpoints that are assumed hostile: looked into, read as numbers, matched by name, and written as safetensors.

Nothing in a file is ever run or imported, and this package needs no torch: tensors are NumPy arrays.
"""

from __future__ import annotations

from cupel.checkpoint.command import inspect_command
from cupel.checkpoint.inspect import Inspection, inspect_file
from cupel.checkpoint.keys import KeyMap, match_keys
from cupel.checkpoint.reading import TensorFile, read_tensors
from cupel.checkpoint.safetensors import write_safetensors
from cupel.checkpoint.tensors import TensorInfo

__all__ = [
    "Inspection",
    "KeyMap",
    "TensorFile",
    "TensorInfo",
    "inspect_command",
    "inspect_file",
    "match_keys",
    "read_tensors",
    "write_safetensors",
]
