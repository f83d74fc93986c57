"""The machine against the unpickler it imitates, and against noise."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
from crafted_pickles import tensor_pickle
from hypothesis import given, settings
from hypothesis import strategies as st

from cupel.checkpoint.inert import run
from cupel.checkpoint.objects import Call, Global

VALUES: list[Any] = [
    {"a": [1, 2.5, None, True, False], "b": ("x", b"y", ()), 3: {"deep": [[1], (2,), (3, 4), (5, 6, 7)]}},
    [2**31, -(2**31), 2**80, -1, 255, 65535, 1e300, "é\n\\ \u4e2d", "quote'", b"\x00\xff" * 200, "long" * 100],
    list(range(2000)),
    {str(i): i for i in range(1500)},
]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_objects_are_what_pickle_makes(protocol: int) -> None:
    for value in VALUES:
        data = pickle.dumps(value, protocol)
        assert pickle.loads(data) == value
        if protocol >= 3 or not _has_bytes(value):
            trace = run(io.BytesIO(data + b"rest"))
            assert (trace.value, trace.end, trace.error) == (value, len(data), "")


def _has_bytes(value: Any) -> bool:
    # Before protocol 3, bytes are a call of _codecs.encode.
    if isinstance(value, dict):
        return any(map(_has_bytes, value.values()))
    return isinstance(value, bytes) or (isinstance(value, (list, tuple)) and any(map(_has_bytes, value)))


def test_shared_objects_stay_shared() -> None:
    inner: list[int] = [1]
    value = run(io.BytesIO(pickle.dumps([inner, inner]))).value
    assert value[0] is value[1]


class Point:
    def __init__(self) -> None:
        self.x = 3


@pytest.mark.parametrize("protocol", range(6))
def test_instances_become_calls(protocol: int) -> None:
    trace = run(io.BytesIO(pickle.dumps(Point(), protocol)))
    assert isinstance(trace.value, Call)
    assert trace.value.states == [{"x": 3}]
    assert Global(__name__, "Point") in trace.globals
    assert any("calls" in uses for uses in trace.globals.values())


def test_a_long_stream_is_given_up() -> None:
    assert run(io.BytesIO(b"N0" * 100 + b"N."), max_steps=50).error == "more than 50 steps"


SEEDS = [
    b"\x80\x02]cos\nsystem\n(X\x04\x00\x00\x00echoq\x00tRa.",
    tensor_pickle((2,), (1,), 0, 2),
    *(pickle.dumps({"a": [1, 2.0, ("x", b"y")], "p": Point()}, protocol) for protocol in range(6)),
]


@settings(max_examples=400, deadline=None, database=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), max_size=6))
def test_noise_never_raises(seed: bytes, edits: list[tuple[int, bytes]]) -> None:
    data = bytearray(seed)
    for place, content in edits:
        place %= len(data) + 1
        data[place : place + len(content)] = content
    trace = run(io.BytesIO(data))
    assert trace.error or trace.end <= len(data)
