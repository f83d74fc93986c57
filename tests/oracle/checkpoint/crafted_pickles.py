"""Pickles that torch would not write."""

from __future__ import annotations

import struct


def tensor_pickle(shape: tuple[int, ...], stride: tuple[int, ...], offset: int, length: int) -> bytes:
    """The pickle of {'w': tensor} over storage 0 of `length` float32, with whatever geometry."""

    def number(value: int) -> bytes:
        return b"\x8b" + struct.pack("<i", 9) + value.to_bytes(9, "little", signed=True)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu" + number(length) + b"tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(shape) + numbers(stride)
    return b"\x80\x02}U\x01w" + rebuild + b"\x89ccollections\nOrderedDict\n)RtRs."
